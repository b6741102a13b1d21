"""The one exception meant for users."""

from minillm.errors import UserError, missing_package


def test_missing_package_names_the_way_out():
    error = missing_package("wandb", purpose="--use_wandb", extra="track")
    assert isinstance(error, UserError)
    assert "pip install wandb" in str(error)
    assert "in the folder of minillm: pip install -e '.[track]'" in str(error)
    assert "pip install -e" not in str(missing_package("x", purpose="y"))
