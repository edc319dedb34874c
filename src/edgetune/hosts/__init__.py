"""The fiddly code, written once: methods supply pure tensor functions, the hosts own autograd."""
