"""Random gradients: drawn where they are written, in one pass that stores nothing else."""

import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from graphpass.dry_run import analyses
from graphpass.method import get_method
from graphpass.site import Gradient


def test_inductor_draws_in_one_kernel() -> None:
    """Two hashes, a logarithm, a root and a cosine for every value, and one store."""
    (analysis,) = analyses(nn.Conv2d(8, 16, 3, padding=1), torch.empty(4, 8, 8, 8))
    (site,) = (s for s in analysis.sites if s.gradient is Gradient.WEIGHT)
    method = get_method("random")
    params = method.make_params({"std": 0.5})
    template = torch.empty(site.output)

    def draw(seed: Tensor) -> Tensor:
        result: Tensor = method.lower(site, params, template, seed, 5)
        return result

    metrics.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        drawn, (code,) = run_and_get_code(torch.compile(draw, fullgraph=True), torch.tensor(3))
    assert metrics.generated_kernel_count == 1
    assert code.count("empty_strided_cpu(") == 1
    torch.testing.assert_close(drawn, draw(torch.tensor(3)), rtol=1e-5, atol=1e-5)
