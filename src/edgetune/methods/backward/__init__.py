"""Methods that change what training keeps and computes; the forward pass stays identical."""
