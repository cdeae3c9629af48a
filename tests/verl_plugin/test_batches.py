"""Mini-batches hold the same responses however many ranks there are."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions, log_seqlen_unbalance

from hpo_verl.verl_plugin.trainer import batches
from hpo_verl.verl_plugin.trainer.batches import deal_mini_batches
from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle


def test_each_mini_batch_is_dealt_by_itself():
    # In the whole batch, {9, 1} {9, 1} would be as even with both long rows in one mini-batch.
    assert sorted(deal_mini_batches([9, 9, 1, 1], mini_batch_size=2, ranks=2)) == [[0, 2], [1, 3]]
    lengths = [9, 1, 5, 5, 2, 8, 4, 6]
    shares = deal_mini_batches(lengths, mini_batch_size=4, ranks=2)
    for rows in shares:
        assert [sum(lengths[row] for row in rows[part : part + 2]) for part in (0, 2)] == [10, 10]


def test_one_rank_keeps_the_order():
    assert deal_mini_batches([3, 1, 2, 9], mini_batch_size=2, ranks=1) == [[0, 1, 2, 3]]


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_shares_partition_every_mini_batch(ranks, share, batches, random):
    size = ranks * share
    lengths = [random.randint(1, 4096) for _ in range(size * batches)]
    shares = deal_mini_batches(lengths, mini_batch_size=size, ranks=ranks)
    for number in range(batches):
        parts = [rank[number * share : (number + 1) * share] for rank in shares]
        assert [len(part) for part in parts] == [share] * ranks
        rows = sorted(row for part in parts for row in part)
        assert rows == list(range(number * size, (number + 1) * size))


class Batch:
    def __init__(self, keys, lengths):
        self.keys = list(keys)
        self.tags = [{"seq_len": length} for length in lengths]

    def reorder(self, order):
        self.keys = [self.keys[row] for row in order]
        self.tags = [self.tags[row] for row in order]


class Parent:
    """Stands for verl's trainer: adds a padding row and balances the whole batch."""

    def _balance_batch(self, batch, metrics, logging_prefix):
        batch.keys.append("padabc_0_0")
        batch.tags.append({"seq_len": 2})
        lengths = [tag["seq_len"] for tag in batch.tags]
        parts = get_seqlen_balanced_partitions(lengths, self.ranks, equal_size=True)
        batch.reorder([row for part in parts for row in part])
        metrics.update(log_seqlen_unbalance(lengths, parts, logging_prefix))
        return batch


class Trainer(LifeCycle, Parent):
    def __init__(self, ranks):
        self.ranks = ranks
        self.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(ranks))})
        actor = {"actor": {"ppo_mini_batch_size": 2}, "rollout": {"n": 2}}
        cluster = {"nnodes": 1, "n_gpus_per_node": ranks}
        reward = {"reward_manager": {"name": "naive"}}
        self.config = OmegaConf.create(
            {"actor_rollout_ref": actor, "trainer": cluster, "reward": reward}
        )

    def _get_required_batch_multiple(self, ranks):
        assert ranks == 1
        return 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mini_batches_do_not_depend_on_the_ranks(ranks):
    keys = ["b_0_0", "a_1_0", "a_0_0", "c_0_0", "a_10_0", "b_1_0", "a_2_0"]
    batch, metrics = Batch(keys, [9, 1, 7, 3, 5, 2, 8]), {}
    Trainer(ranks)._balance_batch(batch, metrics)
    share, rows = len(batch.keys) // ranks, 4 // ranks
    mini_batches = [
        {
            key
            for rank in range(ranks)
            for key in batch.keys[rank * share + start : rank * share + start + rows]
        }
        for start in range(0, share, rows)
    ]
    assert mini_batches == [
        {"a_0_0", "a_1_0", "a_2_0", "a_10_0"},
        {"b_0_0", "b_1_0", "c_0_0", "padabc_0_0"},
    ]
    assert metrics["global_seqlen/mean"] == 37 / ranks


def test_one_rank_and_a_full_batch_need_no_balancing():
    batch, metrics = Batch(["b_0_0", "a_1_0", "a_0_0", "c_0_0"], [9, 1, 7, 3]), {}
    Trainer(1)._balance_batch(batch, metrics)
    assert batch.keys == ["a_0_0", "a_1_0", "b_0_0", "c_0_0"]
    assert metrics == {}


def test_workers_fetch_no_texts(monkeypatch):
    class Passes:
        def _compute_old_log_prob(self, batch, metrics):
            metrics["fetched"] = batch.fields
            return batch

        _update_actor = _compute_old_log_prob

    mixed = type("Mixed", (LifeCycle, Passes), {})
    one = mixed.__new__(mixed)
    one._columns = {}
    columns = ["uid", "prompts", "data_source", "extra_fields", "a_new_one"]

    def meta(batch):
        return SimpleNamespace(field_names=list(columns))

    monkeypatch.setattr(batches, "kv_batch_meta2batch_meta", meta)
    batch, metrics = SimpleNamespace(fields=None), {}
    assert one._compute_old_log_prob(batch, metrics) is batch
    assert (metrics["fetched"], batch.fields) == (["prompts", "a_new_one"], None)
    columns.append("advantages")
    one._update_actor(batch, metrics)
    assert metrics["fetched"] == ["prompts", "a_new_one", "advantages"]
    # Names are looked up once for each pass, and do not change between steps.
    columns.clear()
    one._update_actor(batch, metrics)
    assert metrics["fetched"] == ["prompts", "a_new_one", "advantages"]


@given(st.randoms(use_true_random=False))
def test_a_validation_is_the_same_in_whatever_order_its_responses_ended(random):
    """Their order, and the names of their prompts, are those of chance."""
    rewards = {"a": [0.1, 0.2], "b": [0.3, 0.1], "c": [0.2, 0.1]}
    rows = [(uid, reward) for uid, values in rewards.items() for reward in values]
    random.shuffle(rows)
    names = random.sample("xyz", 3)
    uids = [names["abc".index(uid)] for uid, _ in rows]
    infos = {"reward": [reward for _, reward in rows], "empty": []}
    sources, names, ordered = batches.ordered_validation(["one"] * 6, uids, infos)
    assert (sources, ordered["empty"]) == (["one"] * 6, [])
    assert ordered["reward"] == [0.1, 0.2, 0.1, 0.2, 0.1, 0.3]
    assert names[::2] == names[1::2]
    assert sorted(zip(names, ordered["reward"], strict=True)) == sorted(
        zip(uids, infos["reward"], strict=True)
    )
