"""What diwa is compared with: plain torch on the same weights, written from the equations."""
