"""Submit jobs to clusters, and watch them."""
