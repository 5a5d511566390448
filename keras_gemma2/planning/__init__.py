"""What a model would take on a mesh of devices, before there are any."""
