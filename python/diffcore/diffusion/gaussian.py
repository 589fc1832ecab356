"""The DDPM of the lecture: forward process, posterior, training loss, and both samplers.

Method names and calling conventions are those of guided-diffusion, so a user swaps the import. The
arithmetic is ops', one launch each; the parts that this class is made of only decide which float64
table a launch reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffcore.diffusion.bound import VariationalBound
from diffcore.diffusion.forward import ForwardProcess
from diffcore.diffusion.reverse import ReverseProcess
from diffcore.diffusion.training import TrainingLosses


class GaussianDiffusion(ForwardProcess, TrainingLosses, ReverseProcess, VariationalBound):
    """Variance preserving diffusion with discrete timesteps 0 .. T-1, and its reverse process.

    x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise. A model is called as
    ``model(x, t, **model_kwargs)`` with ``t`` int64 ``[B]``, always timesteps of the training
    schedule, and returns a tensor of the shape of ``x``. Under autocast it may come in another
    floating dtype; it is converted to that of ``x``.

    With a learned variance it returns ``[B, 2C, ...]``: its prediction, then v, along dimension 1.
    v is the log-variance itself ("learned"), or where it lies between log beta_tilde, at v = -1,
    and log beta, at v = 1 ("learned_range"); nothing keeps v between these. The two are read where
    they lie. DDIM reads the prediction alone.

    The tables (``betas``, ``alphas_cumprod``, ``alphas_cumprod_prev``, ``sqrt_alphas_cumprod``,
    ``sqrt_one_minus_alphas_cumprod``, ``log_one_minus_alphas_cumprod``, ``posterior_variance``,
    ``posterior_log_variance_clipped``, ``posterior_mean_coef1``, ``posterior_mean_coef2``) are
    float64 ``[T]`` on the CPU. Kernels read copies, moved once to each device and rounded once.

    Args:
        betas: Variances of the Markov steps, ``[T]`` in (0, 1]. The last may be 1 (zero terminal
            SNR), except with prediction_type "epsilon".
        prediction_type: What the model predicts: "epsilon", "sample" (x_0), "v_prediction" or
            "flow_prediction".
        variance_type: Variance of the reverse step: "fixed_small" (beta_tilde), "fixed_large"
            (beta), or one that the model says, "learned" or "learned_range". At t = 0, where
            beta_tilde is 0 and no noise is drawn, the log-variance that ``p_mean_variance`` reports
            is the next step's log beta_tilde for both fixed ones, and so is the variance of
            "fixed_large" (Ho et al.; guided-diffusion). With T = 1 there is no next step: log beta.
        clip_sample: Clip the predicted x_0 while sampling.
        clip_sample_range: To [-clip_sample_range, clip_sample_range].
        loss_type: What ``training_losses`` computes: "mse", "rescaled_mse", "kl" or "rescaled_kl".

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Betas outside (0, 1], unknown strings, an empty clip range, or epsilon
            prediction with zero terminal SNR.

    Source:
        Ho, Jain and Abbeel 2020 (arXiv 2006.11239); Song, Meng and Ermon 2021 (arXiv 2010.02502);
        Nichol and Dhariwal 2021 (arXiv 2102.09672) for the learned variance.
    """

    def __init__(
        self,
        betas: Tensor,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        loss_type: str = "mse",
    ) -> None:
        super().__init__(
            betas, prediction_type, variance_type, clip_sample, clip_sample_range, loss_type
        )

    def respace(
        self, timesteps: int | Sequence[int], timestep_spacing: str = "leading"
    ) -> GaussianDiffusion:
        """The same process seen at some of its timesteps only.

        Indices of the result run over the chosen timesteps; the model still gets the original ones.

        Args:
            timesteps: How many to keep, or which, in any order.
            timestep_spacing: How to choose them when ``timesteps`` is a number: "leading",
                "trailing" or "linspace".

        Returns:
            A diffusion with as many steps, whose betas are 1 - alphas_cumprod_t /
            alphas_cumprod_prev over the chosen timesteps.

        Source:
            Nichol and Dhariwal 2021 (arXiv 2102.09672) section 4 (SpacedDiffusion).
        """
        rows, betas = self._respaced(timesteps, timestep_spacing)
        spaced = GaussianDiffusion(
            betas,
            self.prediction_type,
            self.variance_type,
            self.clip_sample,
            self.clip_sample_range,
            self.loss_type,
        )
        known = self._timestep_map
        spaced._timestep_map = tuple(known[t] if known else t for t in rows)
        return spaced
