"""The lab: several hosts on this machine, a real SLURM on them, and what is tested there; `make lab`."""
