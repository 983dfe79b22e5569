"""A small set of modalities that the tests of masked modelling share."""

from multitask_jax.masked.modalities import Modality

# Grids and vocabularies of no common size, so that a mixed-up axis shows.
MODALITIES = (
    Modality("rgb", (2, 3, 4), 11),
    Modality("depth", (2, 3, 2), 7),
    Modality("camera", (6,), 5),
    Modality("gaze", (4,), 3),
)
LENGTHS = [24, 12, 6, 4]
