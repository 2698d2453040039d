"""Models from packages on PyPI, small and with random weights; each is built from the package's own classes, unchanged.

A model that a package leaves to its user's training loop (a world model's step, a module on a TensorDict) gets that loop here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Model:
    """A model and what is expected of it.

    Attributes:
        package: the distribution on PyPI.
        name: class of the model, with what was chosen of its options.
        build: makes the model and the arguments of a call.
        calls: calls of this package's ops in one forward of the compiled model, with cells rewritten as on a GPU.
        graphs: into how many graphs Dynamo cuts the model; more than one where the model itself breaks them.
        left: beginnings of the reasons for what was left as it was.
        dtype: float64, or float32 where the model casts to it.
    """

    package: str
    name: str
    build: Callable[[], Built]
    calls: dict[str, int]
    graphs: int = 1
    left: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return f"{self.package} {self.name}"


MODELS: list[Model] = []


Builder = Callable[[], Built]


def model(package: str, name: str, calls: dict[str, int], **expected: Any) -> Callable[[Builder], Builder]:
    def add(build: Builder) -> Builder:
        MODELS.append(Model(package, name, build, calls, **expected))
        return build

    return add


# ---- speech and audio --------------------------------------------------------------------------------------------------------


@model("torchaudio", "WaveRNN", {"gru": 2})
def wavernn() -> Built:
    from torchaudio.models import WaveRNN

    vocoder = WaveRNN([2, 3], n_classes=8, hop_length=6, n_res_block=1, n_rnn=16, n_fc=12, n_freq=10, n_hidden=8, n_output=8)
    return vocoder, (torch.randn(2, 1, 24), torch.randn(2, 1, 10, 8))


@model("speechbrain", "CRDNN (GRU, bidirectional)", {"gru": 1})
def crdnn() -> Built:
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.RNN import GRU

    encoder = CRDNN(
        input_shape=[2, 12, 20], cnn_blocks=1, cnn_channels=[4], rnn_class=GRU, rnn_layers=2, rnn_neurons=8, dnn_blocks=1,
        dnn_neurons=8, dropout=0.0, inter_layer_pooling_size=[2],
    )  # fmt: skip
    return encoder, (torch.randn(2, 12, 20),)


@model(
    "speechbrain", "AttentionalRNNDecoder (gru, location)", {"gru_cell": 8},
    dtype=torch.float32,
    left=("the hidden state is changed between two steps (by stack)",) * 2,
)  # fmt: skip
def attentional_decoder() -> Built:
    from speechbrain.nnet.RNN import AttentionalRNNDecoder

    decoder = AttentionalRNNDecoder(
        "gru", "location", hidden_size=8, attn_dim=6, num_layers=2, enc_dim=7, input_size=5, channels=3, kernel_size=5
    )
    return decoder, (torch.randn(3, 4, 5), torch.randn(3, 9, 7), torch.ones(3))


@model("asteroid", "DPRNN (GRU)", {"gru": 4}, graphs=14)
def dprnn() -> Built:
    from asteroid.masknn.recurrent import DPRNN

    return DPRNN(6, 2, bn_chan=8, hid_size=7, chunk_size=8, n_repeats=2, rnn_type="GRU"), (torch.randn(2, 6, 30),)


# ---- forecasting -------------------------------------------------------------------------------------------------------------


@model("pytorch-forecasting", "GRU (subclass of nn.GRU, lengths with a zero)", {"gru_packed": 1}, graphs=3)
def gru_with_lengths() -> Built:
    from pytorch_forecasting.models.nn.rnn import GRU

    return GRU(5, 6, 2, batch_first=True), (torch.randn(3, 7, 5), None, torch.tensor([7, 3, 0]), False)


@model("pytorch-forecasting", "RecurrentNetwork (GRU)", {"gru_packed": 2}, graphs=10)
def recurrent_network() -> Built:
    from pytorch_forecasting import RecurrentNetwork
    from pytorch_forecasting.data import TorchNormalizer
    from pytorch_forecasting.metrics import MAE

    network = RecurrentNetwork(
        cell_type="GRU", hidden_size=6, rnn_layers=2, dropout=0.0, x_reals=["temperature", "load"],
        time_varying_reals_encoder=["temperature", "load"], time_varying_reals_decoder=["temperature"], target="load",
        loss=MAE(), output_transformer=TorchNormalizer(),
    )  # fmt: skip
    none = torch.zeros(3, 6, 0, dtype=torch.long)
    x = {
        "encoder_cat": none, "encoder_cont": torch.randn(3, 6, 2), "encoder_lengths": torch.tensor([6, 4, 3]),
        "decoder_cat": none[:, :4], "decoder_cont": torch.randn(3, 4, 2), "decoder_lengths": torch.tensor([4, 4, 2]),
        "target_scale": torch.ones(3, 2),
    }  # fmt: skip
    return network, (x,)


# ---- reinforcement learning --------------------------------------------------------------------------------------------------


class OnTensorDict(nn.Module):
    """Calls a module of torchrl on a TensorDict made of tensors."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, observation: Tensor, is_init: Tensor) -> tuple[Tensor, Tensor]:
        from tensordict import TensorDict

        data = TensorDict({"observation": observation, "is_init": is_init}, batch_size=observation.shape[:2])
        data = self.module(data)
        return data["features"], data["next", "recurrent_state"]


def episodes() -> Tensor:
    starts = torch.zeros(2, 5, 1, dtype=torch.bool)
    starts[:, 0] = starts[1, 3] = True
    return starts


@model("torchrl", "GRUModule (pad, an episode ends)", {"gru_packed": 1}, graphs=2)
def gru_module() -> Built:
    from torchrl.modules import GRUModule

    policy = GRUModule(
        input_size=3, hidden_size=4, num_layers=2, in_key="observation", out_key="features", default_recurrent_mode=True
    )
    return OnTensorDict(policy), (torch.randn(2, 5, 3), episodes())


@model("torchrl", "GRU (a Python loop over a hand-written cell)", {"gru": 2})
def python_gru() -> Built:
    from torchrl.modules import GRU

    return GRU(3, 4, 2), (torch.randn(2, 5, 3),)


@model(
    "torchrl", "GRU with a mask", {"gru_cell": 10},
    left=("the hidden state is changed between two steps (by where, unsqueeze)",) * 2,
)  # fmt: skip
def masked_python_gru() -> Built:
    from torchrl.modules import GRU

    return GRU(3, 4, 2), (torch.randn(2, 5, 3), None, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool())


class Imagination(nn.Module):
    """Rolls a prior of torchrl's Dreamer out over given actions and noise."""

    def __init__(self, prior: nn.Module, hidden: int, state: int):
        super().__init__()
        self.prior, self.hidden, self.state = prior, hidden, state

    def forward(self, actions: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        batch = actions.shape[1]
        state, belief = actions.new_zeros(batch, self.state), actions.new_zeros(batch, self.hidden)
        moments = []
        for action, sample in zip(actions, noise, strict=True):
            mean, std, state, belief = self.prior(state, belief, action, sample)
            moments += [mean, std]
        return torch.stack(moments), belief


@model(
    "torchrl", "RSSMPrior, 5 steps", {"gru_cell": 5}, dtype=torch.float32,
    left=("the hidden state is changed between two steps (by float, to)",),
)  # fmt: skip
def rssm_prior() -> Built:
    from torchrl.data import Unbounded
    from torchrl.modules import RSSMPrior

    prior = RSSMPrior(Unbounded(shape=(2,)), hidden_dim=6, rnn_hidden_dim=6, state_dim=3, action_dim=2)
    return Imagination(prior, 6, 3), (torch.randn(5, 2, 2), torch.randn(5, 2, 3))


class DynamicLearning(nn.Module):
    """The loop of sheeprl's training of DreamerV1 over the steps of its world model."""

    def __init__(self, rssm: nn.Module, hidden: int, stochastic: int):
        super().__init__()
        self.rssm, self.hidden, self.stochastic = rssm, hidden, stochastic

    def forward(self, actions: Tensor, embedded: Tensor, is_first: Tensor) -> list[Tensor]:
        state = actions.new_zeros(1, actions.shape[1], self.hidden)
        posterior = actions.new_zeros(1, actions.shape[1], self.stochastic)
        results = []
        for i in range(actions.shape[0]):
            state, posterior, _, posterior_moments, prior_moments = self.rssm.dynamic(
                posterior, state, actions[i : i + 1], embedded[i : i + 1], is_first[i : i + 1]
            )
            results += [state, *posterior_moments, *prior_moments]
        return results


@model(
    "sheeprl", "DreamerV1 RSSM, 4 steps", {"gru_cell": 4},
    left=("the hidden state is changed between two steps (by mul, sub)",),
)  # fmt: skip
def dreamer_v1() -> Built:
    from sheeprl.algos.dreamer_v1.agent import RSSM, RecurrentModel
    from sheeprl.models.models import MLP

    rssm = RSSM(RecurrentModel(4 + 2, 6), MLP(6 + 5, 8, [7]), MLP(6, 8, [7]), {})
    is_first = torch.zeros(4, 3, 1)
    is_first[0] = 1
    return DynamicLearning(rssm, 6, 4), (torch.randn(4, 3, 2), torch.randn(4, 3, 5), is_first)


# ---- graphs, sets and transformers -------------------------------------------------------------------------------------------


@model(
    "torch-geometric", "GatedGraphConv", {"gru_cell": 3},
    left=("its input at a step depends on the hidden state of the step before",),
)  # fmt: skip
def gated_graph_conv() -> Built:
    from torch_geometric.nn import GatedGraphConv

    return GatedGraphConv(6, 3), (torch.randn(8, 5), torch.randint(0, 8, (2, 20)))


@model(
    "torch-geometric", "AttentiveFP", {"gru_cell": 4}, graphs=4,
    left=("the hidden state is changed between two steps (by relu_)",),
)  # fmt: skip
def attentive_fp() -> Built:
    from torch_geometric.nn import AttentiveFP

    network = AttentiveFP(5, 6, 2, edge_dim=3, num_layers=2, num_timesteps=2)
    edges, molecules = torch.randint(0, 8, (2, 20)), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    return network, (torch.randn(8, 5), edges, torch.randn(20, 3), molecules)


@model("torch-geometric", "GRUAggregation", {"gru": 1}, graphs=4)
def gru_aggregation() -> Built:
    from torch_geometric.nn import GRUAggregation

    return GRUAggregation(5, 6), (torch.randn(8, 5), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), None, 2)


@model(
    "slot-attention", "SlotAttention, 3 iterations", {"gru_cell": 3},
    left=("the hidden state is changed between two steps (by reshape, add, linear)",),
)  # fmt: skip
def slot_attention() -> Built:
    from slot_attention import SlotAttention

    return SlotAttention(num_slots=3, dim=6, iters=3, hidden_dim=8), (torch.randn(2, 9, 6),)


@model("x-transformers", "Encoder (gate_residual)", {"gru_cell": 4})
def gated_transformer() -> Built:
    from x_transformers import Encoder

    return Encoder(dim=8, depth=2, heads=2, attn_dim_head=4, gate_residual=True), (torch.randn(2, 5, 8),)


# ---- recommenders ------------------------------------------------------------------------------------------------------------


@dataclass
class Items:
    """As much of recbole's data set as its models read."""

    number: int = 20

    def num(self, _field: str) -> int:
        return self.number


@dataclass
class Options:
    """As much of recbole's configuration as its models read."""

    values: dict[str, Any] = field(default_factory=lambda: {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "negative_", "MAX_ITEM_LIST_LENGTH": 7, "device": "cpu", "loss_type": "CE", "embedding_size": 6,
        "hidden_size": 5, "num_layers": 2, "n_layers": 1, "dropout_prob": 0.0, "dropout_probs": [0.0, 0.0],
    })  # fmt: skip

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def sessions() -> tuple[Tensor, Tensor]:
    return torch.randint(1, 20, (3, 7)), torch.tensor([7, 3, 2])


@model("recbole", "GRU4Rec", {"gru": 1})
def gru4rec() -> Built:
    from recbole.model.sequential_recommender.gru4rec import GRU4Rec

    return GRU4Rec(Options(), Items()), sessions()


@model("recbole", "NARM", {"gru": 1})
def narm() -> Built:
    from recbole.model.sequential_recommender.narm import NARM

    return NARM(Options(), Items()), sessions()


@model("recbole", "DIEN's InterestExtractorNetwork", {"gru_packed": 1}, graphs=4)
def interest_extractor() -> Built:
    from recbole.model.sequential_recommender.dien import InterestExtractorNetwork

    return InterestExtractorNetwork(6, 6, [12, 5, 1]), (torch.randn(3, 7, 6), torch.tensor([7, 3, 2]), torch.randn(3, 7, 6))


def interest_evolution(kind: str) -> Built:
    from recbole.model.sequential_recommender.dien import InterestEvolvingLayer

    layer = InterestEvolvingLayer(torch.arange(7).view(1, -1), 6, 6, [24, 5], gru=kind)
    return layer, (torch.randn(3, 6), torch.randn(3, 7, 6), torch.tensor([7, 3, 2]))


@model("recbole", "DIEN's InterestEvolvingLayer (AIGRU)", {"gru_packed": 1})
def interest_evolution_aigru() -> Built:
    return interest_evolution("AIGRU")


@model("recbole", "DIEN's InterestEvolvingLayer (AUGRU: no GRU)", {}, graphs=9)
def interest_evolution_augru() -> Built:
    return interest_evolution("AUGRU")
