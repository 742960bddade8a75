"""The root of the project's exceptions, and the one that the kernels raise. `kvkern.errors` holds the others."""


class KvkernError(Exception):
    """Any error that kvkern raises on purpose. Its message names the value, the limit and the remedy."""


class LayoutError(KvkernError, ValueError):
    """A tensor, stride or size does not fit the paged layout."""
