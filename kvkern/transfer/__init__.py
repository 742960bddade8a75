"""Copies chunks between paged tensors and slots, in host memory or on a GPU. Beyond this package a chunk is bytes."""
