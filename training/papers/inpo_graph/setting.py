"""A synthetic citation graph of the size of Cora, a graph convolutional network, and the models that unlearning needs.

The graph is a stochastic block model with popular nodes: every node draws two partners, with probability 0.8 from its
own class, in proportion to a popularity that is Pareto distributed. A node is a bag of 18 words, of which a part is on
the topic of its class. With D the degrees of A + I, X the bags, divided by their number of words:

    S = D^-1/2 (A + I) D^-1/2               Z = S relu(S X W1)  (n, H)              logits = Z W2^T  (n, 7)

(GCN, arXiv 1609.02907). For the losses of `npo_kernels` Z holds the hidden states, W2 is the lm-head, the classes are
the vocabulary, and a node is a sequence of one token.

60 % of the nodes are trained on, and a tenth of those is to be forgotten. The retrained model has seen neither their
labels nor their words nor their edges. Models are asked about forget nodes in the whole graph, where these were
learned, and about all others in the graph that is left.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES, VOCABULARY, NUM_WORDS, HIDDEN = 7, 1433, 18, 64
PARTNERS, HOMOPHILY, ON_TOPIC = 2, 0.8, 0.06
TRAIN, FORGET = 0.6, 0.1  # of all nodes, of the training nodes
TRAIN_STEPS, TRAIN_LR, DECAY = 200, 0.01, 1e-4  # Adam
LEARNED = 0.95  # accuracy on the training nodes, below which there is little to forget


@dataclass(frozen=True)
class Graph:
    """An undirected graph without self loops: the neighbours of node i are neighbours[starts[i] : starts[i + 1]]."""

    starts: Tensor  # (n + 1,) int64
    neighbours: Tensor  # (2 m,) int64, each edge from both of its ends

    @classmethod
    def of(cls, edges: Tensor, num_nodes: int) -> "Graph":
        """Of (m, 2) pairs of nodes, in any order and number; a node is no neighbour of itself."""
        both = torch.cat([edges, edges.flip(1)])
        both = both[both[:, 0] != both[:, 1]]
        codes = (both[:, 0] * num_nodes + both[:, 1]).unique()  # sorted: by the first node, then by the second
        counts = torch.bincount(codes // num_nodes, minlength=num_nodes)
        return cls(F.pad(counts.cumsum(0), (1, 0)), codes % num_nodes)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def degrees(self) -> Tensor:
        return self.starts.diff()

    @cached_property
    def scale(self) -> Tensor:
        """(n,) the diagonal of D^-1/2, with the self loops."""
        return (self.degrees + 1).float().rsqrt()

    @cached_property
    def matrix(self) -> Tensor:
        """(n, n) S, sparse."""
        nodes = torch.arange(len(self))
        rows, columns = torch.cat([nodes, nodes.repeat_interleave(self.degrees)]), torch.cat([nodes, self.neighbours])
        values = self.scale[rows] * self.scale[columns]
        shape = (len(self), len(self))
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=True).coalesce()

    def links(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The edges of `nodes`: (E,) place of the node in `nodes`, and (E,) its neighbour."""
        counts = self.degrees[nodes]
        place = torch.arange(len(nodes)).repeat_interleave(counts)
        within = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
        return place, self.neighbours[self.starts[nodes][place] + within]

    def without(self, nodes: Tensor) -> "Graph":
        """The graph with these nodes cut off from all others; numbers stay what they are."""
        cut = torch.zeros(len(self), dtype=torch.bool)
        cut[nodes] = True
        first = torch.arange(len(self)).repeat_interleave(self.degrees)
        kept = ~(cut[first] | cut[self.neighbours])
        return Graph.of(torch.stack([first[kept], self.neighbours[kept]], 1), len(self))


class GCN(nn.Module):
    """Two layers without biases, W1 (words, H) and W2 (classes, H), from normal draws of the generator."""

    def __init__(self, rng: torch.Generator, hidden: int = HIDDEN):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, hidden, generator=rng) / hidden**0.5)
        self.head = nn.Parameter(torch.randn(NUM_CLASSES, hidden, generator=rng) / hidden**0.5)

    def bags(self, words: Tensor) -> Tensor:
        """X W1, (n, H)."""
        return F.embedding_bag(words, self.embedding, mode="mean")

    def forward(self, graph: Graph, bags: Tensor) -> Tensor:
        """Z, (n, H)."""
        return torch.sparse.mm(graph.matrix, torch.relu(torch.sparse.mm(graph.matrix, bags)))


@dataclass(frozen=True)
class Setting:
    """The experiment of one seed; `forget`, `retain` and `test` are numbers of nodes."""

    graph: Graph
    left: Graph  # without the forget nodes
    words: Tensor  # (n, 18) int64
    labels: Tensor  # (n,) int64
    forget: Tensor
    retain: Tensor
    test: Tensor
    reference: GCN  # trained on forget and retain nodes, in the whole graph
    retrained: GCN  # trained on retain nodes, in the graph that is left

    def log_probabilities(self, model: GCN, part: str) -> Tensor:
        """(m, 7) of "forget" nodes in the whole graph, or of "retain" or "test" nodes in the graph that is left."""
        graph = self.graph if part == "forget" else self.left
        hidden = model(graph, model.bags(self.words))[getattr(self, part)]
        return torch.log_softmax(hidden @ model.head.T, 1)

    @cached_property
    def aims(self) -> dict[str, Tensor]:
        """{part: what the retrained model says there}"""
        return {part: self.log_probabilities(self.retrained, part) for part in ("forget", "retain", "test")}


def make_setting(num_nodes: int, seed: int, train_steps: int = TRAIN_STEPS) -> Setting:
    """Draw and train. `RuntimeError` if the reference has not learned its nodes, as there were nothing to forget."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_nodes,), generator=rng)
    graph = Graph.of(_edges(labels, rng), num_nodes)
    words = _words(labels, rng)
    order = torch.randperm(num_nodes, generator=rng)
    train, test = order.split([round(TRAIN * num_nodes), num_nodes - round(TRAIN * num_nodes)])
    forget, retain = train.split([round(FORGET * len(train)), len(train) - round(FORGET * len(train))])
    left = graph.without(forget)
    start = rng.get_state()  # both models from the same weights

    def trained(graph: Graph, nodes: Tensor) -> GCN:
        return _train(GCN(rng.set_state(start)), graph, words, labels, nodes, train_steps)

    reference, retrained = trained(graph, train), trained(left, retain)
    with torch.no_grad():
        logits = reference(graph, reference.bags(words))[train] @ reference.head.T
    accuracy = (logits.argmax(1) == labels[train]).float().mean().item()
    if accuracy < LEARNED:
        raise RuntimeError(
            f"training: expected an accuracy of {LEARNED} on the training nodes after {train_steps} steps, got "
            f"{accuracy:.3f}; take more"
        )
    return Setting(graph, left, words, labels, forget, retain, test, reference, retrained)


def _edges(labels: Tensor, rng: torch.Generator) -> Tensor:
    """(2 n, 2) pairs: every node with each of its partners."""
    n = len(labels)
    popularity = torch.rand(n, generator=rng).clamp(min=1e-6).rsqrt()  # Pareto, P(> x) = x^-2: some have many links
    first = torch.arange(n).repeat(PARTNERS)
    own = torch.rand(len(first), generator=rng) < HOMOPHILY
    second = torch.empty_like(first)
    for label in range(NUM_CLASSES):
        for inside in (True, False):
            asked = (labels[first] == label) & (own == inside)
            if asked.any():
                likely = popularity * ((labels == label) == inside)
                second[asked] = torch.multinomial(likely, int(asked.sum()), replacement=True, generator=rng)
    return torch.stack([first, second], 1)


def _words(labels: Tensor, rng: torch.Generator) -> Tensor:
    """(n, 18): word w is on the topic of class w mod 7."""
    shape = (len(labels), NUM_WORDS)
    anywhere = torch.randint(VOCABULARY, shape, generator=rng)
    of_topic = torch.randint(VOCABULARY // NUM_CLASSES, shape, generator=rng) * NUM_CLASSES + labels.unsqueeze(1)
    return torch.where(torch.rand(shape, generator=rng) < ON_TOPIC, of_topic, anywhere)


def _train(model: GCN, graph: Graph, words: Tensor, labels: Tensor, nodes: Tensor, steps: int) -> GCN:
    """Full-batch Adam on the mean NLL of `nodes`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=TRAIN_LR, weight_decay=DECAY)
    for _ in range(steps):
        logits = model(graph, model.bags(words))[nodes] @ model.head.T  # of 7 classes: nothing to fuse
        loss = F.cross_entropy(logits, labels[nodes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)
