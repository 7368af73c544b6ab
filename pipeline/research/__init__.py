"""Many runs: sweeps, comparisons, scaling fits."""
