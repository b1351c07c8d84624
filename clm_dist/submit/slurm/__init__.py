"""Jobs on Slurm: the script for sbatch, the commands of Slurm, and Ray on its hosts."""
