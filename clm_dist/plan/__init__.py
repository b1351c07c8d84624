"""What a job will take, before it is run: memory, time, cost, disk."""
