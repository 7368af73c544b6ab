"""What several tests share: commands, small models, runs, ranks, a Slurm cluster."""
