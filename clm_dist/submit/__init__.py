"""From a job file to a cluster: what is submitted, and what becomes of it."""
