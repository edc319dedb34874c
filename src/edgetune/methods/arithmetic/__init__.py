"""Methods that change the numbers a layer computes with: one paper, one file."""
