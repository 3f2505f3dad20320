"""The influence of a node on the others: their predictions with and without it.

    influence(v) = sum over u != v of 1/2 sum_c |p_u(c) - p_u(c; v cut off)|

by removal: v loses its edges, the weights of the model stay. Without v the degrees of its neighbours change, so that
the first layer changes within 2 hops of v and the predictions within 3, and nowhere else; the rest is computed once for
all v. A node costs what its surroundings cost, whatever the size of the graph.

arXiv 2510.19479 weights its loss by an influence that it estimates fast, by removal. The formulas here are
reconstructed from that description, not taken from the paper: distance of predictions, and weights of mean 1.
"""

import torch
from torch import Tensor

from training.papers.inpo_graph.setting import GCN, Graph


@torch.no_grad()
def removal_influence(model: GCN, graph: Graph, words: Tensor, nodes: Tensor) -> Tensor:
    """(m,) influence of each of `nodes`, in expected changes of class among all other nodes."""
    bags = model.bags(words)
    classes = torch.relu(torch.sparse.mm(graph.matrix, bags)) @ model.head.T  # (n, C): the second layer mixes these
    before = torch.softmax(torch.sparse.mm(graph.matrix, classes), 1)
    found = []
    for node in nodes.split(1):
        one, two, three = _surroundings(graph, node)
        scale = graph.scale.clone()
        scale[one] = graph.degrees[one].float().rsqrt()  # one neighbour less
        scale[node] = 1.0
        changed = classes.clone()
        changed[two] = torch.relu(_mixed(graph, scale, bags, two, node)) @ model.head.T
        others = three[three != node]
        after = torch.softmax(_mixed(graph, scale, changed, others, node), 1)
        found.append((after - before[others]).abs().sum() / 2)
    return torch.stack(found)


def influence_weights(influence: Tensor) -> Tensor:
    """(m,) factors of mean 1, in proportion to the influence. ValueError where all of it is 0."""
    if not influence.sum() > 0:
        raise ValueError("expected a forget set that something depends on, got an influence of 0 for every node")
    return influence * (len(influence) / influence.sum())


def _surroundings(graph: Graph, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The neighbours of a node, and all nodes within 2 and within 3 hops, itself among them."""
    one = graph.links(node)[1]
    two = torch.cat([node, one, graph.links(one)[1]]).unique()
    return one, two, torch.cat([two, graph.links(two)[1]]).unique()


def _mixed(graph: Graph, scale: Tensor, values: Tensor, rows: Tensor, cut: Tensor) -> Tensor:
    """These rows of S values, where S has another scale (n,) and lacks the edges of the node that is cut off."""
    place, neighbours = graph.links(rows)
    kept = (rows[place] != cut) & (neighbours != cut)
    place, neighbours = place[kept], neighbours[kept]
    scaled = scale[rows].unsqueeze(1) * values[rows]
    scaled = scaled.index_add(0, place, scale[neighbours].unsqueeze(1) * values[neighbours])
    return scale[rows].unsqueeze(1) * scaled
