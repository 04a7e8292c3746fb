"""Running the real loop to learn from it: reference trajectories and statistics of sites."""
