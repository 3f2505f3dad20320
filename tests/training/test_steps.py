"""Plans: which rows are drawn, when they repeat, and that the seed determines them."""

from training.config import TrainConfig
from training.steps import plan_unlearning

CONFIG = TrainConfig(epochs=3, lr=1e-3, batch_size=6, seed=4)


def by_epoch(plan, kind):
    per_epoch = len(plan.steps) // CONFIG.epochs
    rows = [getattr(step, kind) for step in plan.steps]
    return [[i for batch in rows[e * per_epoch : (e + 1) * per_epoch] for i in batch] for e in range(CONFIG.epochs)]


def test_every_epoch_takes_the_forget_set_once_in_a_new_order():
    plan = plan_unlearning(20, 60, 0, CONFIG)
    epochs = by_epoch(plan, "forget")
    assert [len(step.forget) for step in plan.steps] == [6, 6, 6, 2] * 3
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_retain_rows_are_drawn_anew_and_repeat_only_when_all_are_used():
    plan = plan_unlearning(20, 60, 0, CONFIG)
    retain = by_epoch(plan, "retain")
    assert sorted(i for epoch in retain for i in epoch) == list(range(60))
    assert all(len(step.retain) == len(step.forget) for step in plan.steps)
    few = by_epoch(plan_unlearning(20, 8, 0, CONFIG), "retain")
    assert sorted(few[0][:8]) == sorted(few[0][8:16]) == list(range(8))


def test_refusals_belong_to_the_questions_of_the_step():
    plan = plan_unlearning(20, 60, 100, CONFIG)
    for step in plan.steps:
        assert [plan.idk[i][0] for i in step.idk] == step.forget
    assert len(set(plan.idk)) == len(plan.idk) <= 60
    assert len({refusal for _, refusal in plan.idk}) > 20  # not one and the same


def test_a_seed_determines_the_plan():
    assert plan_unlearning(20, 60, 100, CONFIG) == plan_unlearning(20, 60, 100, CONFIG)
    other = TrainConfig(epochs=3, lr=1e-3, batch_size=6, seed=5)
    assert plan_unlearning(20, 60, 100, CONFIG) != plan_unlearning(20, 60, 100, other)


def test_fixed_partners_are_those_of_the_row_in_every_epoch_and_for_every_seed():
    partners = {}
    for seed in (4, 5):
        recipe = TrainConfig(epochs=3, lr=1e-3, batch_size=6, seed=seed)
        plan = plan_unlearning(20, 60, 100, recipe, fixed_partners=True)
        for step in plan.steps:
            for row, retain, idk in zip(step.forget, step.retain, step.idk, strict=True):
                assert partners.setdefault(row, (retain, plan.idk[idk])) == (retain, plan.idk[idk])
    assert len(partners) == 20 and len({retain for retain, _ in partners.values()}) > 10
