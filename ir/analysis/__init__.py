"""What passes ask of a graph: sites, rates, and which rows write which channels."""
