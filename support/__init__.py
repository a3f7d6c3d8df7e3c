"""What surrounds the components: files, flags, run folders, devices, evaluation, plots."""
