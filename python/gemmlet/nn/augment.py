"""Settings of augmentation."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .. import _arguments as arguments
from ..formulas.augmentation import Settings

# The largest value of each: within these no number of the compiled kernels overflows.
_LARGEST = {"rotate": 180.0, "scale": 0.5, "shear": 1.0, "shift": 1024.0, "elastic": 32.0, "noise": 255.0, "erase": 1.0}


@dataclass(frozen=True)
class Augment:
    """How images are changed for training: each by numbers of its own, drawn anew in each epoch.

    0 leaves something out. The defaults are for digits, which must stay what they are.

    Parameters
    ----------
    rotate : float, 0 to 180
        Rotation around the middle of the image, in degrees: uniform within [-rotate, rotate].
    scale : float, 0 to 0.5
        Height and width are multiplied each by a number of its own, uniform within [1 - scale, 1 + scale].
    shear : float, 0 to 1
        Rows are shifted by this many pixels for each pixel of their distance from the middle: uniform within
        [-shear, shear].
    shift : float, 0 to 1024
        Shift along each axis, in pixels of the original: uniform within [-shift, shift].
    elastic : float, 0 to 32
        Standard deviation of a smooth displacement of each pixel along each axis, in pixels: a cubic B-spline over a
        grid of random displacements, of which the longer side has four intervals. At 28 pixels these are 7 pixels wide,
        and the field is as smooth as Simard's with a deviation of 4 pixels [1]_.
    noise : float, 0 to 255
        Standard deviation of what is added to each pixel, in grey levels of 256: nearly normal, the sum of four uniform
        numbers, at most 3.45 deviations. Results are clipped to 0 to 255.
    erase : float, 0 to 1
        Probability with which a rectangle of an image is set to 0, of 2 to 40 % of the image, its height 0.3 to 3.3
        times its width, anywhere within the image [2]_; what would exceed the image is cut off.

    Raises
    ------
    TypeError, ValueError
        A setting is not a real number, or not within its range.

    References
    ----------
    .. [1] Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual document
       analysis", 2003.
    .. [2] Zhong, Zheng, Kang, Li and Yang, "Random erasing data augmentation", 2017.

    Examples
    --------
    >>> Augment(rotate=15, noise=8)
    Augment(rotate=15.0, scale=0.12, shear=0.12, shift=1.0, elastic=1.2, noise=8.0, erase=0.0)
    """

    rotate: float = 12.0
    scale: float = 0.12
    shear: float = 0.12
    shift: float = 1.0
    elastic: float = 1.2
    noise: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = arguments.number(getattr(self, field.name), field.name, low=0.0, high=_LARGEST[field.name])
            object.__setattr__(self, field.name, value)

    @property
    def settings(self) -> Settings:
        """The numbers, as backends take them."""
        return Settings(*(getattr(self, name) for name in Settings._fields))
