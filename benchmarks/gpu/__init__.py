"""One step of LoRA training on one device, pronghorn beside its peers; see ``__main__``."""
