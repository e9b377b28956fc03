"""Ridge regressions in closed form, from sums that do not grow with the number of tokens.

Shapes: N tokens, D channels, K features, F features of the linear map. Sums are kept in float64.
"""

import torch

__all__ = ["ChannelRidge", "LinearRidge", "SharedRidge"]


def _solve(gram: torch.Tensor, right: torch.Tensor, ridge: float, left_out: torch.Tensor | float = 0) -> torch.Tensor:
    """Solves `(gram + ridge * mean(diag(gram) - left_out) * I) x = right`; the last two dimensions are matrices.

    A feature that is 0 for all tokens gets the coefficient 0.

    Args:
        gram: Sums of products of the features.
        right: Sums of products of the features with the targets.
        ridge: Penalty, relative to the mean square of the features.
        left_out: Sums of squares of those tokens that do not count in that mean square.
    """
    size = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    penalty = ridge * (diagonal - left_out).mean(-1, keepdim=True).expand_as(diagonal)
    is_dead = diagonal == 0
    penalty = torch.where(is_dead, torch.ones_like(diagonal), penalty)
    solved = torch.linalg.lstsq(gram + torch.diag_embed(penalty), right.reshape(*gram.shape[:-2], size, -1)).solution
    return solved.masked_fill(is_dead[..., None], 0)  # up to rounding it is already


class ChannelRidge:
    """One coefficient per feature and channel: `y_ND ~ sum_k c_KD f_KND`.

    Args:
        num_features: K.
        num_channels: D.
        ridge: Penalty on the coefficients relative to the mean square of the features, in each channel apart.
    """

    def __init__(self, num_features: int, num_channels: int, ridge: float, device: torch.device | None = None) -> None:
        self.ridge = ridge
        self.gram_DKK = torch.zeros(num_channels, num_features, num_features, dtype=torch.float64, device=device)
        self.right_DK = torch.zeros(num_channels, num_features, dtype=torch.float64, device=device)

    def add(self, features_KND: torch.Tensor, target_ND: torch.Tensor) -> None:
        """Adds tokens."""
        by_channel = features_KND.permute(2, 0, 1).double()
        self.gram_DKK += by_channel @ by_channel.transpose(1, 2)
        self.right_DK += (by_channel @ target_ND.T.double()[:, :, None])[..., 0]

    def solve(self) -> torch.Tensor:
        """Returns the coefficients, (K, D)."""
        return _solve(self.gram_DKK, self.right_DK, self.ridge)[..., 0].T


class SharedRidge(ChannelRidge):
    """One coefficient per feature for all channels, `y_ND ~ sum_k c_k f_KND`: each entry counts as a token.

    Args:
        num_features: K.
        ridge: Penalty on the coefficients relative to the mean square of the features.
    """

    def __init__(self, num_features: int, ridge: float, device: torch.device | None = None) -> None:
        super().__init__(num_features, 1, ridge, device)

    def add(self, features_KND: torch.Tensor, target_ND: torch.Tensor) -> None:
        """Adds tokens."""
        super().add(features_KND.flatten(1)[..., None], target_ND.flatten()[:, None])

    def solve(self) -> torch.Tensor:
        """Returns the coefficients, (K,)."""
        return super().solve()[:, 0]


class LinearRidge:
    """A linear map with a constant, `y_ND ~ x_NK W^T + b`, shrunk towards a prior instead of 0.

    Args:
        num_channels: K.
        ridge: Penalty on the distance from the prior relative to the mean square of the features.
        device: Where the sums are.
        num_outputs: D; default: K.
        constant: Whether there is a b.
    """

    def __init__(
        self,
        num_channels: int,
        ridge: float,
        device: torch.device | None = None,
        num_outputs: int | None = None,
        constant: bool = True,
    ) -> None:
        self.ridge, self.constant = ridge, constant
        rows, columns = num_channels + constant, num_channels if num_outputs is None else num_outputs
        self.gram_FF = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        self.right_FD = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._outside_penalty_F = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, x_NK: torch.Tensor, target_ND: torch.Tensor, in_penalty: bool = True) -> None:
        """Adds tokens.

        Args:
            x_NK: Inputs of the map.
            target_ND: Its targets.
            in_penalty: Whether the tokens count in the mean square that the penalty is relative to.
        """
        features_NF = (torch.cat([x_NK, torch.ones_like(x_NK[:, :1])], 1) if self.constant else x_NK).double()
        self.gram_FF += features_NF.T @ features_NF
        self.right_FD += features_NF.T @ target_ND.double()
        if not in_penalty:
            self._outside_penalty_F += features_NF.square().sum(0)

    def solve(self, prior_FD: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the map transposed, (F, D) with F = K + 1; the last row is the constant. Without it F = K.

        Args:
            prior_FD: The prior in the same layout; default: 0.
        """
        prior_FD = torch.zeros_like(self.right_FD) if prior_FD is None else prior_FD.to(self.gram_FF)
        right_FD = self.right_FD - self.gram_FF @ prior_FD
        return prior_FD + _solve(self.gram_FF, right_FD, self.ridge, self._outside_penalty_F)
