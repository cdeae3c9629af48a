"""README's overrides for a run of one's own compose with verl's configuration."""

import re
import shlex
from pathlib import Path

from hydra import compose, initialize_config_dir

from hpo_verl.config.recipes import verl_configurations
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode

README = Path(__file__).parents[2] / "README.md"


def test_the_overrides_of_the_readme_compose_and_are_meant():
    section = README.read_text().split("## In your own verl run", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"```bash\n(python -m verl.trainer.main_ppo .*?)```", section, re.DOTALL)
    overrides = [word for word in shlex.split(block.replace("\\\n", " "))[3:] if word != "..."]
    with initialize_config_dir(str(verl_configurations()), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert check_algorithm(config) == []
    check_trainer_mode(config)
    assert config.algorithm.adv_estimator == "a_hpo"
    assert config.trainer.v1.trainer_mode == "hpo_sync"
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR == "hpo"
