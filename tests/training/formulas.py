"""Every method written out from its source, in float64 on materialised logits: the oracle for a step.

Independent of the kernels and of training/methods: nothing of either is imported but the records' names and settings.
"""

import copy
from functools import partial

import torch
from torch.nn.functional import logsigmoid, one_hot

from training.data import collate

CPU = torch.device("cpu")


class Forward:
    """Of the rows of one kind, whole: logits, activations, and what is scored."""

    def __init__(self, model, examples):
        self.batch = collate(examples, 0, CPU)
        self.layers = {}
        hooks = [layer.register_forward_hook(partial(self._keep, i)) for i, layer in enumerate(model.model.layers)]
        self.logits = model(self.batch["input_ids"], attention_mask=self.batch["attention_mask"]).logits
        for hook in hooks:
            hook.remove()
        self.labels = self.batch["labels"]
        self.next = torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=-100)
        self.scored = self.next != -100
        self.logp = self.logits.log_softmax(-1)
        token = self.logp.gather(-1, self.next.clamp(min=0)[..., None]).squeeze(-1)
        self.token = torch.where(self.scored, token, 0.0)  # (B, S)
        self.sums, self.counts = self.token.sum(1), self.scored.sum(1)

    def _keep(self, i, layer, args, output):
        self.layers[i] = output

    def tokens(self, values):
        """(T, ...) of (B, S, ...) where a token is scored."""
        return values[self.scored]

    def per_sequence(self, values):
        """(B,) means over the scored positions."""
        return torch.where(self.scored, values, 0.0).sum(1) / self.counts


def loss_of_step(steps, model, reference, k, retain_weight=None):
    """The loss of step k: one forward of every kind of rows, whole, in float64."""
    model, reference = (copy.deepcopy(m).double().eval() for m in (model, reference))
    return loss_in_double(steps, model, reference, k, retain_weight), model


def loss_in_double(steps, model, reference, k, retain_weight=None):
    method, s = steps.method, steps.settings
    members = steps.plan.steps[k]._asdict()
    members["alternate"] = members["idk"]
    rows = {kind: [steps.rows[kind][i] for i in members[kind]] for kind in method.needs}
    now = {kind: Forward(model, some) for kind, some in rows.items()}
    with torch.no_grad():
        before = {kind: Forward(reference, some) for kind, some in rows.items()}
    refs = {
        kind: steps.frozen.scores[kind].logps[members[kind]].double() for kind in now if kind in steps.frozen.scores
    }
    assert method.family in FORGET, f"tests/training/formulas.py: FORGET has no formula of {method.family!r}"
    loss = s.forget_weight * FORGET[method.family](now, before, refs, s, steps, members)
    weight = s.retain_weight if retain_weight is None else retain_weight
    if method.retain is None:
        return loss
    return loss + weight * (RETAIN[method.retain](now["retain"], before["retain"], s) - s.epsilon * method.dual)


def nll(f):
    return -f.sums.sum() / f.counts.sum()


def kl_of_retain(now, before, s):
    mask = now.scored if s.kl_positions == "answer" else now.batch["attention_mask"].bool()
    return (before.logp.exp() * (before.logp - now.logp)).sum(-1)[mask].mean()


def layer_of(f, s):
    return f.layers[s.layer if s.layer is not None else max(f.layers)]  # the models here have fewer than 8


def distance(now, target, s):
    """Mean over sequences of the mean over answer positions of the mean over dimensions."""
    square = (layer_of(now, s) - target).square().mean(-1)
    if s.kl_positions == "all":
        mask = now.batch["attention_mask"].double()
        return ((square * mask).sum(1) / mask.sum(1)).mean()
    return now.per_sequence(square).mean()


RETAIN = {
    "nll": lambda now, before, s: nll(now),
    "kl": kl_of_retain,
    "activations": lambda now, before, s: distance(now, layer_of(before, s), s),
}


def log_sigmoid_mean(x, beta):
    return -(2 / beta) * logsigmoid(x).mean()


def npo(now, before, refs, s, *_):
    return log_sigmoid_mean(-s.beta * (now["forget"].sums - refs["forget"]), s.beta)


def preference(other, factor):
    def loss(now, before, refs, s, *_):
        margin = (now[other].sums - refs[other]) - (now["forget"].sums - refs["forget"])
        return factor * log_sigmoid_mean(s.beta * margin, s.beta)

    return loss


def kto(now, before, refs, s, *_):
    z = s.beta * (now["idk"].sums - refs["idk"]).detach().mean()
    return log_sigmoid_mean(z - s.beta * (now["forget"].sums - refs["forget"]), s.beta)


def simnpo(now, before, refs, s, *_):
    f = now["forget"]
    return log_sigmoid_mean(s.beta * (-f.sums / f.counts - s.gamma), s.beta)


def weighted(weight):
    """Gradient ascent with a constant weight of each token."""

    def loss(now, before, refs, s, *_):
        logp = now["forget"].tokens(now["forget"].token)
        return (weight(logp.exp(), s).detach() * logp).mean()

    return loss


def ceu(now, before, refs, s, *_):
    f = now["forget"]
    order = f.scored.cumsum(1)
    counted = f.scored & (order > s.skip_tokens)
    if not counted.any():
        return 0 * f.sums.sum()
    z, label = f.logits[counted], f.next[counted]
    without = z.detach().scatter(1, label[:, None], -torch.inf)
    return torch.nn.functional.cross_entropy(z, without.softmax(-1))


def tnpo(now, before, refs, s, steps, members):
    scores = steps.frozen.scores["forget"]
    ends = scores.num_tokens.cumsum(0)
    pieces = [scores.token_logps[ends[i] - scores.num_tokens[i] : ends[i]] for i in members["forget"]]
    ratio = now["forget"].tokens(now["forget"].token) - torch.cat(pieces).double()
    return log_sigmoid_mean(-s.beta * ratio, s.beta)


def catnip(now, before, refs, s, *_):
    f = now["forget"]
    reverse = (1 - f.token.exp()).detach().clamp(min=1e-300).log()
    return f.per_sequence(-(2 / s.beta) * logsigmoid(-s.beta * (f.token - reverse))).mean()


def pdu(now, before, refs, s, *_):
    f = now["forget"]
    margin = (f.logits.max(-1).values - f.logits.mean(-1)).square()
    return margin[f.labels != -100].mean() if s.published_rows else f.tokens(margin).mean()


def undial(now, before, refs, s, *_):
    f, teacher = now["forget"], before["forget"]
    if s.published_rows:  # every position but the last, the label -100 counted from the end of the vocabulary
        label = f.labels[:, 1:] % f.logits.shape[-1]
        soft = (teacher.logits[:, :-1] - s.beta * one_hot(label, f.logits.shape[-1])).softmax(-1)
        return -(soft * f.logp[:, :-1]).sum(-1).mean()
    label = one_hot(f.next.clamp(min=0), f.logits.shape[-1])
    soft = (teacher.logits - s.beta * label).log_softmax(-1)
    return f.tokens((soft.exp() * (soft - f.logp)).sum(-1)).mean()


def unit_direction(size, seed):
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed)).double()
    return drawn / drawn.norm()


def rmu(now, before, refs, s, *_):
    f = now["forget"]
    target = s.steering * unit_direction(f.layers[0].shape[-1], s.seed)
    if s.published_rows:
        square = (layer_of(f, s) - target).square().mean(-1)
        mask = (f.labels != -100).double()
        return ((square * mask).sum(1) / mask.sum(1)).mean()
    return distance(f, target, s)


def adaptive_rmu(now, before, refs, s, *_):
    f, frozen = now["forget"], layer_of(before["forget"], s)
    target = s.steering * frozen.norm(dim=-1, keepdim=True) * unit_direction(frozen.shape[-1], s.seed)
    return distance(f, target, s)


def dipo(now, before, refs, s, *_):
    f = now["forget"]
    z = f.logits.detach()
    top = torch.zeros_like(z).scatter(-1, z.topk(s.top_k, -1).indices, 1.0)

    def divergence(shift):
        q = (z + shift * top).log_softmax(-1)
        return torch.where(f.scored, (q.exp() * (q - f.logp)).sum(-1), 0.0).sum(1)

    return log_sigmoid_mean(s.beta * (divergence(s.shift) - divergence(-s.shift)), s.beta)


# Constants by family, where a loss with a threshold would be flat at the defaults: in the test model the mean
# log-probability of a sequence is between about -7.0 and -6.4.
SETTINGS: dict[str, dict[str, float]] = {}
FORGET = {
    "ga": lambda now, *_: -nll(now["forget"]),
    "idk": lambda now, *_: nll(now["idk"]),
    "npo": npo,
    "simnpo": simnpo,
    "dpo": preference("idk", 0.5),
    "altpo": preference("alternate", 1.0),
    "kto": kto,
    "wga": weighted(lambda p, s: p**s.beta),
    "satimp": weighted(lambda p, s: p**s.beta * (1 - p) ** s.beta2),
    "ceu": ceu,
    "tnpo": tnpo,
    "catnip": catnip,
    "pdu": pdu,
    "undial": undial,
    "rmu": rmu,
    "adaptive_rmu": adaptive_rmu,
    "dipo": dipo,
}
