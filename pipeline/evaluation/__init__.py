"""What a trained model can do: bits per byte, reconstruction, robustness, causality self-check."""
