"""The one exception of the kernels; `kvkern.errors` puts it into the project's tree."""


class LayoutError(ValueError):
    """A tensor, stride or size does not fit the paged layout. Names the value and what was expected."""
