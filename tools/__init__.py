"""What only this repository needs: pictures and tables of the docs, the demo, benchmarks."""
