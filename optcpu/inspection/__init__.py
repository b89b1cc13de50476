"""What :func:`optcpu.inspect` is made of: reading graphs, comparing them, and showing them."""
