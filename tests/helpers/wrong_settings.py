"""Settings that are illegal or teach nothing: changes of keys, the finding, and words of it."""

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"

UNLEARNABLE = [
    ({f"{ROLLOUT}.n": 1}, "rollout.n=1: the estimator a_hpo compares the responses"),
    ({f"{ROLLOUT}.n": 1, "algorithm.adv_estimator": "rloo"}, "the estimator rloo compares"),
    ({f"{ROLLOUT}.temperature": 0.0}, "rollout.temperature=0.0: sampling is greedy"),
    ({f"{ROLLOUT}.top_k": 1}, "rollout.top_k=1: sampling is greedy"),
    ({f"{ACTOR}.optim.lr": 0.0}, "optim.lr=0: no update"),
    ({f"{ACTOR}.grad_clip": 0}, "grad_clip=0: no update"),
]
OUT_OF_RANGE = [
    ({f"{ACTOR}.ppo_mini_batch_size": 128}, "must divide data.train_batch_size=64"),
    ({f"{ACTOR}.ppo_mini_batch_size": 3}, "must divide data.train_batch_size=64"),
    ({"trainer.total_training_steps": 0}, "total_training_steps=0"),
    ({"data.max_prompt_length": None}, "max_prompt_length=None: must be an integer"),
    ({"trainer.nnodes": None}, "nnodes=None: must be an integer"),
    ({f"{ACTOR}.optim.lr": -1e-6}, "lr=-1e-06: must be a number in [0, 1]"),
    ({f"{ACTOR}.optim.lr": "fast"}, "lr='fast': must be a number"),
    ({f"{ACTOR}.optim.lr": float("nan")}, "lr=nan"),
    ({f"{ROLLOUT}.n": 0}, "rollout.n=0: must be an integer >= 1"),
    ({f"{ROLLOUT}.n": 2.5}, "rollout.n=2.5: must be an integer"),
    ({f"{ROLLOUT}.n": True}, "rollout.n=True: must be an integer"),
    ({"seed": -1}, "seed=-1"),
    ({"data.gen_batch_size": 128}, "gen_batch_size=128: must divide data.train_batch_size=64"),
    ({"data.dataloader_num_workers": -1}, "dataloader_num_workers=-1: must be an integer"),
    ({f"{ROLLOUT}.val_kwargs.n": 0}, "val_kwargs.n=0: must be an integer >= 1"),
    ({f"{ROLLOUT}.agent.num_workers": 0}, "agent.num_workers=0: must be an integer"),
    ({"trainer.max_actor_ckpt_to_keep": 0}, "max_actor_ckpt_to_keep=0: must be an integer >= 1"),
    ({"trainer.resume_mode": "bogus"}, "resume_mode=bogus: must be one of auto, disable"),
    ({"trainer.resume_mode": 5}, "resume_mode=5: must be one of auto, disable"),
    ({f"{ACTOR}.kl_loss_type": "bogus"}, "kl_loss_type=bogus: must be one of kl, k1"),
    ({"algorithm.kl_penalty": "full"}, "kl_penalty=full: must be one of kl, k1"),
    ({f"{ACTOR}.optim.lr_scheduler_type": "linear"}, "must be one of constant, cosine"),
    ({f"{ACTOR}.checkpoint.save_contents": ["model", "all"]}, "save_contents=all: must be one of"),
    ({f"{ROLLOUT}.log_prob_use_dynamic_bsz": False}, "must be that of actor_rollout_ref.actor"),
]
SWITCHES = [
    ({"trainer.val_before_train": "no"}, "val_before_train='no': must be true or false"),
    ({f"{ACTOR}.use_kl_loss": "off"}, "use_kl_loss='off': must be true or false"),
    ({f"{ROLLOUT}.log_prob_use_dynamic_bsz": "yes"}, "use_dynamic_bsz='yes': must be true or"),
    ({f"{ACTOR}.optim": 5}, "optim=5: is a section; set one of its keys"),
    ({"data.shuffle": "maybe"}, "data.shuffle='maybe': must be true or false"),
]
OLDER_KEYS = [
    ({"reward_model.num_workers": 3}, "reward_model.num_workers=3: verl 0.9 does not read"),
    ({"reward_model.reward_manager": "dapo"}, "older key of reward.reward_manager.name"),
    ({"reward_model.model.path": "/m"}, "older key of reward.reward_model.model_path"),
    ({"reward_model.enable": True}, "older key of reward.reward_model.enable"),
    ({"custom_reward_function.name": "f"}, "older key of reward.custom_reward_function.name"),
    ({"sandbox_fusion.url": "http://x"}, "older key of reward.sandbox_fusion.url"),
]
NOT_TOGETHER = [
    ({f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, "permits token-mean and"),
    ({f"{ACTOR}.policy_loss.loss_mode": "kl_cov"}, "covariance"),
    ({"algorithm.hpo.alpha_min": 1.5}, "alpha_min"),
]
UNKNOWN_NAMES = [
    ({"algorithm.adv_estimator": "a_hop"}, "did you mean a_hpo"),
    ({f"{ACTOR}.policy_loss.loss_mode": "vanila"}, "did you mean vanilla"),
    ({"trainer.v1.trainer_mode": "hpo_snc"}, "did you mean hpo_sync"),
    ({"reward.reward_manager.name": "naiv"}, "did you mean naive"),
    ({f"{ROLLOUT}.name": "vlm"}, "did you mean vllm"),
    ({f"{ROLLOUT}.agent.default_agent_loop": "single_turn"}, "single_turn_agent"),
    ({"trainer.logger": ["console", "mlflo"]}, "trainer.logger=mlflo: not registered with verl"),
    ({f"{ROLLOUT}.checkpoint_engine.backend": "ncll"}, "backend=ncll: not registered with verl"),
    ({f"{ACTOR}.strategy": "fsdp3"}, "strategy=fsdp3: not registered with verl"),
]
# verl's four parts are the tiny recipe's four mini-batches.
SEPARATE = {
    "trainer.v1.trainer_mode": "hpo_separate_async",
    f"{ROLLOUT}.nnodes": 1,
    f"{ROLLOUT}.n_gpus_per_node": 1,
}
REFUSED_BY_VERL = [
    (SEPARATE | {"trainer.v1.separate_async.parameter_sync_step": 3}, "3 mini-batches; must be"),
    (SEPARATE | {f"{ROLLOUT}.nnodes": 0}, "rollout.nnodes = 0: trainer.v1.trainer_mode = 'hpo_sep"),
    (SEPARATE | {f"{ROLLOUT}.n_gpus_per_node": 0}, "n_gpus_per_node = 0: trainer.v1.trainer_mode"),
    (SEPARATE, "checkpoint_engine.backend = 'naive': trainer.v1.trainer_mode = 'hpo_sep"),
    ({f"{ROLLOUT}.dtype_": 1}, ROLLOUT),
]
TOO_SHORT = [
    ({f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 39}, "gpu=39: a"),
    (
        {f"{ACTOR}.use_dynamic_bsz": True, f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 39},
        "rollout.log_prob_max_token_len_per_gpu=39: a",
    ),
    (
        {
            f"{ACTOR}.use_dynamic_bsz": True,
            f"{ACTOR}.use_kl_loss": True,
            "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 39,
        },
        "ref.log_prob_max_token_len_per_gpu=39: a",
    ),
    ({f"{ROLLOUT}.max_model_len": 32}, "max_model_len=32: a prompt and its response may have 16"),
]
CODE_OF_OTHERS = [
    ({f"{ACTOR}.policy_loss._target_": "os.system"}, "_target_=os.system"),
    ({"hydra.callbacks.mine._target_": "evil.Callback"}, "mine._target_=evil.Callback"),
    ({f"{ACTOR}._target_": "${seed}"}, "_target_=${seed}"),
]
LOADED_CODE_OF_OTHERS = [
    ({f"{ACTOR}.optim.optimizer_impl": "evil"}, "optim.optimizer_impl=evil"),
    ({"actor_rollout_ref.model.external_lib": "os"}, "model.external_lib=os"),
    ({"actor_rollout_ref.model.external_lib": ["hpo_verl.core", "evil"]}, "external_lib.1=evil"),
    ({"reward.custom_reward_function.path": "pkg://evil.reward"}, "path=pkg://evil"),
    (
        {"reward.custom_reward_function.path": "pkg://hpo_verl/../evil"},
        "path=pkg://hpo_verl/../evil",
    ),
    ({"reward.reward_manager.module.path": "pkg://evil"}, "path=pkg://evil"),
    ({"trainer.checkpoint_callback_class": "evil.Callback"}, "callback_class=evil.Callback"),
    ({"trainer.v1.sampler.custom_sampler.path": "pkg://evil"}, "sampler.path=pkg://evil"),
    ({f"{ROLLOUT}.agent.agent_loop_manager_class": "evil.M"}, "manager_class=evil.M"),
    *(
        ({f"{key}.trust_remote_code": True}, f"{key}.trust_remote_code=True: would execute code")
        for key in ("actor_rollout_ref.model", "critic.model", "data")
    ),
]
ABSENT_MODULES = [
    ({"trainer.logger": ["console", "swanlab"]}, "trainer.logger=swanlab imports swanlab, not"),
    ({f"{ROLLOUT}.trace.backend": "weave"}, "trace.backend=weave imports weave, not installed"),
]
CASES = [
    (changes, name, words)
    for name, cases in (
        ("learning", UNLEARNABLE),
        ("settings", [*OUT_OF_RANGE, *SWITCHES]),
        ("older keys", OLDER_KEYS),
        ("algorithm", NOT_TOGETHER),
        ("names", UNKNOWN_NAMES),
        ("verl's checks", REFUSED_BY_VERL),
        ("lengths", TOO_SHORT),
        ("targets", CODE_OF_OTHERS),
        ("code", LOADED_CODE_OF_OTHERS),
        ("modules", ABSENT_MODULES),
    )
    for changes, words in cases
]


def as_overrides(changes):
    """The changes as Hydra overrides, whether a key is there or not."""
    return [f"++{key}={_value(value)}" for key, value in changes.items()]


def _value(value):
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"'{value}'" if "://" in str(value) else str(value)
