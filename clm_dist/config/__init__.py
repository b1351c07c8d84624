"""The job file: its sections, how it is read, and how its errors name file and line."""
