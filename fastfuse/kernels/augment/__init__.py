"""Per-sample pad, flip, crop and normalisation of images that live on the device, in one gather."""
