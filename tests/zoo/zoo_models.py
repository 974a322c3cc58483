"""Variants of models: layers of torch, what people build of them, and what a forward does beside computing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from zoo_lives import Fields, mlp


class Wrapped(nn.Module):
    """A body of 4 features between a linear layer and a head; what a variant is about is the body."""

    def __init__(self, body: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x, width: int = 4) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, width), body, nn.Linear(width, 1)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.before(self.stem(x)))
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y.reshape(x.shape[0], -1)).tanh()


def body(make: Callable[[], nn.Module], **options: Any) -> Callable[[], Fields]:
    return lambda: {"model": lambda: Wrapped(make(), **options)}


def model(make: Callable[[], nn.Module], **fields: Any) -> Callable[[], Fields]:
    return lambda: {"model": make, **fields}


def as_image(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 2, 2)


def as_series(x: Tensor) -> Tensor:
    return x.reshape(-1, 2, 2)


def as_groups(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, 1)


class Tied(nn.Module):
    """The decoder's weight is the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x).tanh()))


class Transposed(nn.Module):
    """The encoder's weight is used again, transposed, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.encoder(x).tanh(), self.encoder.weight.t()))


class Twice(nn.Module):
    """A block that is used twice, here and there under a checkpoint."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2))
        self.head, self.recompute = nn.Linear(4, 1), recompute

    def call(self, x: Tensor) -> Tensor:
        if self.recompute is None or not self.training:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.recompute)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return self.head(self.call(self.call(x)))


class Recomputed(Twice):
    """The block is used once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(x.clone().requires_grad_()))


class Sequenced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.head(self.layers(x))
        return self.head(checkpoint_sequential(self.layers, 2, x, use_reentrant=False))


class Unused(nn.Module):
    """A layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Routed(nn.Module):
    """Experts: which one a slot uses depends on its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = int(x[0].abs().sum() * 7) % 3
        return self.experts[chosen](x)


class Depth(nn.Module):
    """Stochastic depth: a layer is left out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = x + layer(x).tanh()
        return self.head(x)


class Sampled(nn.Module):
    """Gumbel softmax, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.choose, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.gumbel_softmax(self.choose(x), tau=0.7, hard=True)
        return self.head(chosen * x + 0.1 * torch.randn_like(x))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, scale = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * scale.exp())


class Frozen(nn.Module):
    """A frozen backbone, held in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).requires_grad_(False)
        self.head = nn.Linear(6, 1)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Adapter(nn.Module):
    """Low-rank adapters over frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4) * 0.1), nn.Parameter(torch.zeros(4, 2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x) + x @ self.down.t() @ self.up.t())


class Spectrum(nn.Module):
    """A complex parameter, beside real ones or alone."""

    def __init__(self, *, real: bool) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.ones(1)) if real else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4).sum(1, keepdim=True)


class Mixed(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second, self.dtype = nn.Linear(4, 8).to(dtype), nn.Linear(8, 1), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to(self.dtype)).tanh().float())


class Scalar(nn.Module):
    """Parameters without dimensions, of one row, and without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.row = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.randn(1, 4))
        self.nothing = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * self.row).sum(1, keepdim=True) + self.nothing.sum()


class Listed(nn.Module):
    """A ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([torch.randn(4, 4) * 0.3 for _ in range(2)])
        self.named = nn.ParameterDict({"out": torch.randn(4, 1), "bias": torch.zeros(1)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.several:
            x = (x @ weight).tanh()
        return x @ self.named["out"] + self.named["bias"]


class Ensemble(nn.Module):
    """Members that are evaluated at once by vmap and functional_call."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parameters, buffers = stack_module_state(list(self.members))
        shape = nn.Linear(4, 1, device="meta")
        return vmap(lambda p, b: functional_call(shape, (p, b), (x,)))(parameters, buffers).mean(0)


class Stacked(nn.Module):
    """The same with weights that are parameters themselves, stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 1, 4)), nn.Parameter(torch.zeros(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return vmap(F.linear, (None, 0, 0))(x, self.weight, self.bias).mean(0)


class Meta(nn.Module):
    """MAML: one inner step by autograd.grad and functional_call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            parameters = dict(self.net.named_parameters())
            inner = functional_call(self.net, parameters, (x,)).pow(2).mean()
            gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        return functional_call(self.net, moved, (x,))


class Physics(nn.Module):
    """The output is a derivative by the input, by torch.func or by autograd.grad."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.net, self.functional = mlp(), functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            return vmap(grad(lambda one: self.net(one).sum()))(x).sum(1, keepdim=True)
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0].sum(1, keepdim=True)


class Jacobian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return vmap(jacrev(self.net))(x).sum((1, 2)).unsqueeze(1)


class Clamp(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Binary(torch.autograd.Function):
    """A product whose backward draws from torch's generator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.sign().t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.sign(), gradient.t() @ x + 0.01 * torch.randn_like(weight)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Clamp.apply(Binary.apply(x, self.weight)))


class Looked(nn.Module):
    """Embedded numbers, by a table or by bags."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.out = table, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table((x.abs() * 3).long().clamp(max=7))
        return self.out(y.mean(1) if y.ndim == 3 else y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1) * torch.arange(1.0, 4).view(1, 3, 1)
        return self.out(self.attend(x, x, x)[0].mean(1))


class Lazy(nn.Module):
    """A lazy layer that has seen a batch when the model is built."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.LazyLinear(5), nn.Linear(5, 1)
        self.first(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).relu())


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.transpose(0, 1)) / 2


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def recurrent(kind: Any, **options: Any) -> Callable[[], Fields]:
    return body(lambda: kind(2, 2, batch_first=True, **options), before=as_series)


def transformer() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 8, dropout=0.1, batch_first=True), 2)


VARIANTS: dict[str, Callable[[], Fields]] = {
    "conv": body(lambda: nn.Conv2d(1, 4, 2), before=as_image),
    "conv_transposed": body(lambda: nn.ConvTranspose2d(1, 1, 1), before=as_image),
    "conv_channels_last": body(lambda: nn.Conv2d(1, 4, 2).to(memory_format=torch.channels_last), before=as_image),
    "batch_norm": body(lambda: nn.BatchNorm1d(4)),
    "batch_norm_momentum_none": body(lambda: nn.BatchNorm1d(4, momentum=None)),
    "batch_norm_untracked": body(lambda: nn.BatchNorm1d(4, track_running_stats=False)),
    "batch_norm_2d": body(lambda: nn.BatchNorm2d(1), before=as_image),
    "group_norm": body(lambda: nn.GroupNorm(2, 4)),
    "instance_norm_tracked": body(lambda: nn.InstanceNorm2d(1, affine=True, track_running_stats=True), before=as_image),
    "layer_norm": body(lambda: nn.LayerNorm(4)),
    "rms_norm": body(lambda: nn.RMSNorm(4)),
    "sync_batch_norm": body(lambda: nn.SyncBatchNorm(4)),
    "dropout": body(lambda: nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.2))),
    "rrelu": body(lambda: nn.RReLU()),
    "lstm": recurrent(nn.LSTM),
    "lstm_two_layers": recurrent(nn.LSTM, num_layers=2, dropout=0.3, bidirectional=False),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "transformer": body(transformer, before=as_series),
    "attention": model(Attention),
    "weight_norm": body(lambda: parametrizations.weight_norm(nn.Linear(4, 4))),
    "spectral_norm": body(lambda: parametrizations.spectral_norm(nn.Linear(4, 4))),
    "orthogonal": body(lambda: parametrizations.orthogonal(nn.Linear(4, 4))),
    "old_weight_norm": body(lambda: nn.utils.weight_norm(nn.Linear(4, 4))),
    "old_spectral_norm": body(lambda: nn.utils.spectral_norm(nn.Linear(4, 4))),
    "parametrized": body(parametrized),
    "pruned": body(lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)),
    "tied": model(Tied),
    "tied_transposed": model(Transposed),
    "used_twice": model(Twice),
    "checkpointed": model(lambda: Recomputed(False)),
    "checkpointed_reentrant": model(lambda: Recomputed(True)),
    "checkpointed_twice": model(lambda: Twice(False)),
    "checkpointed_twice_reentrant": model(lambda: Twice(True)),
    "checkpointed_sequential": model(Sequenced),
    "unused_layer": model(Unused),
    "routed_by_the_data": model(Routed),
    "stochastic_depth": model(Depth),
    "gumbel": model(Sampled),
    "vae": model(VAE),
    "frozen_backbone": model(Frozen),
    "adapters": model(Adapter),
    "complex_beside_real": model(lambda: Spectrum(real=True)),
    "complex_alone": model(lambda: Spectrum(real=False)),
    "mixed_with_float64": model(lambda: Mixed(torch.float64)),
    "mixed_with_bfloat16": model(lambda: Mixed(torch.bfloat16)),
    "scalars_and_nothing": model(Scalar),
    "listed_parameters": model(Listed),
    "ensemble_by_vmap": model(Ensemble),
    "stacked_by_vmap": model(Stacked),
    "maml": model(Meta),
    "derivative_of_the_input": model(lambda: Physics(functional=False)),
    "derivative_by_func": model(lambda: Physics(functional=True)),
    "jacobian": model(Jacobian),
    "autograd_function": model(Custom),
    "embedding": model(lambda: Looked(nn.Embedding(8, 4, padding_idx=0))),
    "embedding_by_frequency": model(lambda: Looked(nn.Embedding(8, 4, scale_grad_by_freq=True))),
    "embedding_sparse": model(lambda: Looked(nn.Embedding(8, 4, sparse=True))),
    "embedding_max_norm": model(lambda: Looked(nn.Embedding(8, 4, max_norm=0.5))),
    "embedding_bag": model(lambda: Looked(nn.EmbeddingBag(8, 4, mode="mean"))),
    "embedding_bag_max_norm": model(lambda: Looked(nn.EmbeddingBag(8, 4, max_norm=1.0, mode="sum"))),
    "lazy": model(Lazy),
    "still_lazy": model(lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))),
    "no_parameter_to_train": model(lambda: mlp().requires_grad_(False)),
    "half_of_it_frozen": model(lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))),
    "six_slots": model(lambda: nn.Sequential(mlp(), nn.BatchNorm1d(1), nn.Dropout(0.2)), num_slots=6),
    "four_slots": model(lambda: nn.Sequential(mlp(), nn.BatchNorm1d(1), nn.Dropout(0.2)), num_slots=4),
    "bf16": model(lambda: nn.Sequential(mlp(), nn.LayerNorm(1), nn.Dropout(0.2)), precision="bf16"),
    "fp16": model(lambda: nn.Sequential(mlp(), nn.Dropout(0.2)), precision="fp16"),
    "clipped": model(lambda: nn.Sequential(mlp(), nn.Dropout(0.2)), grad_clip_norm=0.05, num_slots=4),
}
