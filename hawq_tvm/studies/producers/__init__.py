"""A table of networks by producers: what each tool's quantized file becomes here."""
