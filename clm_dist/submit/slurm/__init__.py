"""Jobs on Slurm: the script for sbatch, what Slurm is asked and told, and Ray on its hosts."""
