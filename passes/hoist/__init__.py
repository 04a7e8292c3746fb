"""Values computed at the rate at which they change."""
