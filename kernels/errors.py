"""Root of the project's exceptions and the one the kernels raise. `kvkern.errors` holds the rest of the tree."""


class KvkernError(Exception):
    """Any error kvkern reports on purpose. Its message names the value, the limit and the remedy."""


class LayoutError(KvkernError, ValueError):
    """A tensor, stride or size does not fit the paged layout."""
