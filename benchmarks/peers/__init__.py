"""What diwa is compared with: plain torch modules on the same weights, written from the equations."""
