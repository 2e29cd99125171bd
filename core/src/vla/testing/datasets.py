"""The conformance kit of datasets. numpy only."""

from __future__ import annotations

import functools
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla import registry
from vla.compose import load_object, resolve
from vla.datasets import Dataset, DatasetInfo
from vla.errors import DataError, VlaError
from vla.settings import fields_of
from vla.testing.parts import PartConformance

HORIZON = 6


@functools.cache
def opened(cls: type[DatasetConformance]) -> tuple[Dataset, dict[str, Any], Any]:
    """The class's dataset, its settings, and the folder that keeps it alive."""
    folder = tempfile.TemporaryDirectory()
    settings = cls().prepare(Path(folder.name))
    return cls().open(settings), settings, folder


class DatasetConformance(PartConformance):
    """A dataset: random access to raw samples in the robot's own units.

    A third party's class says how to get a small one, unless the part has data at its default settings:

        def prepare(self, folder):
            ...write a few frames into folder...
            return {"path": str(folder)}
    """

    kind = "dataset"

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write a small dataset (two episodes at least); gives the settings that open it."""
        return {}

    def open(self, settings: dict[str, Any]) -> Dataset:
        """The dataset with these settings."""
        chosen = resolve("dataset", {"part": self.name, **settings}, "dataset")
        return load_object(chosen.part.numpy, f"dataset {self.name!r}")(chosen.settings)

    @property
    def chosen(self) -> Any:
        """The part at its defaults."""
        return resolve("dataset", {"part": self.name}, "dataset")

    @property
    def data(self) -> Dataset:
        """The small dataset."""
        return opened(type(self))[0]

    # ---- instead of a variant, beside which a dataset stands --------------------------------------------------------

    def test_samples_have_keys_that_something_reads(self) -> None:
        """Others are refused in training: a misspelt `actions_is_pad` would turn its mask off without a word."""
        known = {"images", "image_masks", "state", "actions", "actions_is_pad", "prompt", "episode", "frame", "dataset"}
        assert set(self.data.sample(0, HORIZON)) <= known | {"extra"}

    def test_a_variant_with_it_survives_its_file(self) -> None:
        """A dataset is no part of a variant; its own table survives."""
        table = self.chosen.table()
        assert resolve("dataset", table, "dataset") == self.chosen

    def test_names_of_parts_are_all_that_a_file_can_say(self) -> None:
        assert self.part.numpy not in str(self.chosen.table())

    # ---- what it declares -------------------------------------------------------------------------------------------

    def test_keeps_the_protocol(self) -> None:
        assert isinstance(self.data, Dataset), "see vla.datasets.Dataset"
        assert isinstance(self.data.info, DatasetInfo)

    def test_info_is_complete(self) -> None:
        info = self.data.info
        assert info.cameras and info.state_dim > 0 and info.action_dim > 0 and info.hz > 0
        assert all(height > 0 and width > 0 for height, width in info.cameras.values())

    def test_names_and_units_fit_the_widths(self) -> None:
        info = self.data.info
        for what, dim in (("state", info.state_dim), ("action", info.action_dim)):
            names = getattr(info, f"{what}_names")
            assert len(names) in (0, dim), f"{len(names)} names of {dim} values of {what}"
        for key, dim in (("state", info.state_dim), ("actions", info.action_dim)):
            assert len(info.units.get(key, ())) in (0, dim), f"units of {key}: one per value"

    def test_its_robot_is_known(self) -> None:
        robot = self.data.info.robot
        assert robot == "" or robot in {item.name for item in registry.listed("robot")}, f"no robot part {robot!r}"

    def test_episodes_lie_end_to_end(self) -> None:
        at = 0
        for episode in self.data.episodes:
            assert episode.start == at and len(episode) > 0 and episode.step == 1
            at = episode.stop
        assert at == len(self.data) > 0

    def test_arrays_are_whole(self) -> None:
        info, n = self.data.info, len(self.data)
        states, actions = self.data.states(), self.data.actions()
        assert states.shape == (n, info.state_dim) and states.dtype == np.float32 and np.isfinite(states).all()
        assert actions.shape == (n, info.action_dim) and actions.dtype == np.float32 and np.isfinite(actions).all()

    def test_every_frame_has_an_instruction(self) -> None:
        prompts = list(self.data.prompts())
        assert len(prompts) == len(self.data) and all(isinstance(p, str) for p in prompts)
        assert set(prompts) <= set(self.data.info.tasks) or not self.data.info.tasks

    # ---- samples ----------------------------------------------------------------------------------------------------

    def test_samples_have_the_shapes_of_the_contract(self) -> None:
        info = self.data.info
        for index in (0, len(self.data) // 2, len(self.data) - 1):
            sample = self.data.sample(index, HORIZON)
            assert sample["state"].shape == (info.state_dim,) and sample["state"].dtype == np.float32
            assert sample["actions"].shape == (HORIZON, info.action_dim) and sample["actions"].dtype == np.float32
            assert sample["actions_is_pad"].shape == (HORIZON,) and sample["actions_is_pad"].dtype == bool
            assert isinstance(sample["prompt"], str)
            assert set(sample["images"]) == set(info.cameras)
            for name, image in sample["images"].items():
                assert image.dtype == np.uint8 and image.shape == (*info.cameras[name], 3), name

    def test_samples_agree_with_the_arrays(self) -> None:
        states, actions, prompts = self.data.states(), self.data.actions(), self.data.prompts()
        for number, episode in enumerate(self.data.episodes):
            for frame, index in ((0, episode.start), (len(episode) - 1, episode.stop - 1)):
                sample = self.data.sample(index, 1, images=False)
                assert np.array_equal(sample["state"], states[index])
                assert np.array_equal(sample["actions"][0], actions[index])
                assert (sample["prompt"], sample["episode"], sample["frame"]) == (prompts[index], number, frame)

    def test_chunks_do_not_run_into_the_next_episode(self) -> None:
        """Past its end the last action is repeated, and marked."""
        actions = self.data.actions()
        for episode in self.data.episodes:
            for index in {episode.start, max(episode.start, episode.stop - 2), episode.stop - 1}:
                sample = self.data.sample(index, HORIZON, images=False)
                steps = np.arange(index, index + HORIZON)
                assert np.array_equal(sample["actions_is_pad"], steps >= episode.stop)
                assert np.array_equal(sample["actions"], actions[np.minimum(steps, episode.stop - 1)])

    @pytest.mark.parametrize("horizon", [1, 3, 500])
    def test_any_horizon(self, horizon: int) -> None:
        sample = self.data.sample(0, horizon, images=False)
        assert sample["actions"].shape == (horizon, self.data.info.action_dim)

    def test_cameras_can_be_chosen(self) -> None:
        one = next(iter(self.data.info.cameras))
        assert set(self.data.sample(0, 1, cameras=[one])["images"]) == {one}
        assert not self.data.sample(0, 1, cameras=[]).get("images")
        assert not self.data.sample(0, 1, images=False).get("images")

    def test_chosen_images_are_the_same_images(self) -> None:
        whole = self.data.sample(0, 1)["images"]
        for name, image in whole.items():
            assert np.array_equal(self.data.sample(0, 1, cameras=[name])["images"][name], image)

    def test_unknown_cameras_are_refused_by_name(self) -> None:
        with pytest.raises(DataError, match="no_such_camera"):
            self.data.sample(0, 1, cameras=["no_such_camera"])

    def test_frames_that_are_not_there_are_refused(self) -> None:
        for index in (len(self.data), -len(self.data) - 1):
            with pytest.raises(DataError):
                self.data.sample(index, 1, images=False)

    # ---- the same every time ----------------------------------------------------------------------------------------

    def test_samples_are_the_same_every_time(self) -> None:
        same(self.data.sample(1, HORIZON), self.data.sample(1, HORIZON))

    def test_samples_belong_to_who_asked(self) -> None:
        """Writing into a sample changes nothing for the next reader."""
        first = self.data.sample(0, HORIZON)
        kept = {"state": first["state"].copy(), "actions": first["actions"].copy()}
        for key in ("state", "actions"):
            if first[key].flags.writeable:
                first[key][:] = 99
        again = self.data.sample(0, HORIZON)
        assert all(np.array_equal(again[key], value) for key, value in kept.items())

    def test_a_second_reader_gives_the_same(self) -> None:
        other = self.open(opened(type(self))[1])
        same(other.sample(0, HORIZON), self.data.sample(0, HORIZON))
        assert other.info == self.data.info

    def test_the_digest_is_the_identity_of_the_data(self) -> None:
        digest = self.data.digest()
        assert isinstance(digest, str) and len(digest) >= 32
        assert self.open(opened(type(self))[1]).digest() == digest

    def test_it_travels_to_worker_processes(self) -> None:
        """Loaders send the dataset to spawned processes."""
        copy = pickle.loads(pickle.dumps(self.data))
        same(copy.sample(0, HORIZON), self.data.sample(0, HORIZON))

    def test_threads_may_read_at_once(self) -> None:
        wanted = [i % len(self.data) for i in range(24)]
        alone = {i: self.data.sample(i, 2) for i in set(wanted)}
        with ThreadPoolExecutor(4) as pool:
            for i, sample in zip(wanted, pool.map(lambda i: self.data.sample(i, 2), wanted), strict=True):
                same(sample, alone[i])

    # ---- mistakes ---------------------------------------------------------------------------------------------------

    def test_a_wrong_path_is_a_clear_error(self, tmp_path: Path) -> None:
        if "path" not in fields_of(self.part.settings) or not opened(type(self))[1].get("path"):
            pytest.skip("the part reads no path that a user gives")
        (tmp_path / "notes.txt").write_text("no data here")
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(VlaError) as caught:
                self.open({**opened(type(self))[1], "path": str(path)}).sample(0, 1)
            assert str(path) in str(caught.value)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert that two samples are equal."""
    assert set(a) == set(b)
    for key in a:
        if key == "images":
            assert a[key].keys() == b[key].keys()
            assert all(np.array_equal(a[key][name], b[key][name]) for name in a[key])
        else:
            assert np.array_equal(a[key], b[key]), key
