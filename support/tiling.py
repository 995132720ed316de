"""EfficientAD in little memory: what is too much at once is computed in parts, to the same maps."""

import math

import torch
from torch import Tensor

from efficientad import CHANNELS, EfficientAD, squared_distance

TILE = 2**28  # elements of a PDN's first activation at once: 1 GiB in float32, 32 images at 256²


class TiledEfficientAD(EfficientAD):
    """EfficientAD that computes the maps of a large batch in smaller ones, of a large image in
    strips. Teacher and student see all that the receptive fields of a strip's outputs cover, so
    there are no seams. The autoencoder needs the whole image."""

    def raw_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As EfficientAD's."""
        if not self.oversized(images):
            return super().raw_maps(images)
        n = max(1, TILE // self.activation)
        function = self.raw_maps_in_strips if n == 1 else super().raw_maps
        local_maps, global_maps = zip(*(function(part) for part in images.split(n)))
        return torch.cat(local_maps), torch.cat(global_maps)

    @property
    def activation(self) -> int:
        """Elements of a PDN's first activation, its largest, for one image."""
        width = 128 if self.config["size"] == "small" else 256
        return width * math.prod(self.image_size)

    def oversized(self, images: Tensor) -> bool:
        """Whether these images are too much at once."""
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        return len(images) * self.activation > TILE

    def raw_maps_in_strips(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`raw_maps` of one image, strip by strip."""
        x = self.normalize(images)
        autoencoder = self.autoencoder(x)
        height, maps = autoencoder.shape[2], []
        step = max(8, TILE * height // self.activation)
        for top in range(0, height, step):
            bottom = min(top + step, height)
            if self.padding:  # rows within 9 of a strip's inner edge would see its zeros
                first, last = max(0, top - 9), min(height, bottom + 9)
                strip = x[:, :, 4 * first : 4 * last]
            else:  # output row i sees the input rows 4i to 4i + 32
                first, strip = top, x[:, :, 4 * top : 4 * bottom + 29]
            rows = slice(top - first, bottom - first)
            teacher, student = (features[:, :, rows] for features in self.pdn_features(strip))
            student, student_ae = student.split(CHANNELS, 1)
            global_map = squared_distance(autoencoder[:, :, top:bottom], student_ae)
            maps.append((squared_distance(teacher, student), global_map))
        local_maps, global_maps = zip(*maps)
        return torch.cat(local_maps, 2), torch.cat(global_maps, 2)
