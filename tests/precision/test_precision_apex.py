"""apex: the check for it, which imports nothing, in four cases; and the step, with a double of apex.amp.

The double (`doubles/apex_with_amp`) does the seven things on which the step relies, and an eighth for slots and ranks.
They are tested here too.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.precision import Apex
from disttrain.precision.apex import require_amp

DOUBLE = Path(__file__).parent / "doubles" / "apex_with_amp"


def forget_apex(monkeypatch) -> None:
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def amp(monkeypatch):
    """Return the double of `apex.amp`, newly imported."""
    forget_apex(monkeypatch)
    monkeypatch.syspath_prepend(DOUBLE)
    from apex import amp

    yield amp
    forget_apex(monkeypatch)


def package(folder: Path, *files: str) -> Path:
    for file in ("__init__.py", *files):
        path = folder / "apex" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('a check must not import it')")
    return folder


class TestFourCases:
    @pytest.fixture(autouse=True)
    def no_apex(self, monkeypatch, tmp_path):
        forget_apex(monkeypatch)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "apex").exists())])

    def test_absent(self):
        with pytest.raises(ModuleNotFoundError, match=r"no package apex; install NVIDIA's .* tag 25\.05"):
            Apex()

    def test_the_wrong_package(self, tmp_path):
        package(tmp_path, "lib/libapex.py")
        with pytest.raises(ModuleNotFoundError, match=r"another package of that name in .*pip uninstall apex"):
            Apex()

    def test_a_module_of_that_name(self, tmp_path):
        (tmp_path / "apex.py").write_text("raise ImportError('a check must not import it')")
        with pytest.raises(ModuleNotFoundError, match=r"another package of that name in .*apex\.py"):
            Apex()

    def test_too_new_for_amp(self, tmp_path):
        package(tmp_path, "multi_tensor_apply/multi_tensor_apply.py", "optimizers/fused_adam.py")
        with pytest.raises(ModuleNotFoundError, match=r'too new .*amp_mode="amp".*fused optimizers'):
            Apex()

    def test_right(self, tmp_path):
        files = ("multi_tensor_apply/multi_tensor_apply.py", "optimizers/fused_adam.py", "amp/frontend.py")
        package(tmp_path, *files)
        require_amp()
        assert "apex" not in sys.modules


def make() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    return parameter, torch.optim.SGD([parameter], lr=0.5)


class TestTheStep:
    def test_is_the_step_by_hand(self, amp):
        parameter, optimizer = make()
        precision = Apex()
        assert precision.prepare(nn.Linear(1, 1), optimizer)[1] is optimizer
        for _ in range(2):  # two microbatches: the gradients of the second are added to those of the first
            with precision.forward():
                loss = (parameter**2).sum()
            precision.backward(loss, optimizer)
        assert torch.equal(parameter.grad, torch.tensor([4.0, 8.0]))

        def clip() -> None:
            assert precision.master_params(optimizer) == [parameter]
            nn.utils.clip_grad_value_(precision.master_params(optimizer), 1.0)

        assert precision.update(optimizer, clip) is True
        assert torch.equal(parameter.detach(), torch.tensor([0.5, 1.5]))

    def test_an_overflow_in_any_microbatch_skips_exactly_that_update(self, amp):
        parameter, optimizer = make()
        precision = Apex()
        precision.prepare(nn.Linear(1, 1), optimizer)
        stepped = []
        for factors in ((1.0, math.inf), (1.0, 1.0)):
            optimizer.zero_grad()
            for factor in factors:
                precision.backward(parameter.sum() * factor, optimizer)
            stepped.append(precision.update(optimizer))
        assert stepped == [False, True]
        assert torch.equal(parameter.detach(), torch.tensor([0.0, 1.0]))

    def test_before_step_that_says_no_skips_the_update(self, amp):
        parameter, optimizer = make()
        precision = Apex()
        precision.prepare(nn.Linear(1, 1), optimizer)
        precision.backward(parameter.sum(), optimizer)
        assert precision.update(optimizer, lambda: False) is False
        assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0]))

    @pytest.mark.parametrize("at_update", [False, True])
    def test_no_to_an_update_that_overflowed_leaves_the_next_one_alone(self, amp, at_update):
        parameter, optimizer = make()
        precision = Apex(unscale_at_update=at_update)
        precision.prepare(nn.Linear(1, 1), optimizer)
        stepped = []
        for factor, answer in ((math.inf, False), (1.0, None)):
            optimizer.zero_grad()
            precision.backward(parameter.sum() * factor, optimizer)
            stepped.append(precision.update(optimizer, lambda answer=answer: answer))
        assert stepped == [False, True]
        assert torch.equal(parameter.detach(), torch.tensor([0.5, 1.5]))

    def test_under_a_schedule_an_overflow_skips_exactly_that_update_too(self, amp):
        parameter, optimizer = make()
        precision = Apex()
        precision.prepare(nn.Linear(1, 1), optimizer)
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # replaces the optimizer's `step` by its own
        stepped = []
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            precision.backward(parameter.sum() * factor, optimizer)
            stepped.append(precision.update(optimizer))
        assert stepped == [True, False, True]
        assert torch.equal(parameter.detach(), torch.tensor([0.0, 1.0]))

    def test_gradients_that_meet_after_their_backwards_stay_scaled_until_the_update(self, amp):
        parameter, optimizer = make()
        precision = Apex(unscale_at_update=True)
        precision.prepare(nn.Linear(1, 1), optimizer)
        for inject, stepped in ((1.0, True), (math.inf, False), (1.0, True)):
            optimizer.zero_grad()
            taken = []
            for factor in (1.0, 2.0):
                precision.backward(parameter.sum() * factor, optimizer)
                taken.append(parameter.grad)
                parameter.grad = None
            scale = amp.state_dict()["loss_scaler0"]["loss_scale"]
            assert torch.equal(taken[1], torch.full((2,), 2 * scale))
            parameter.grad = (taken[0] * inject + taken[1]) / 2  # as SlotGradients adds the slots and ranks
            seen = []
            assert precision.update(optimizer, lambda seen=seen: seen.append(parameter.grad.clone())) is stepped
            assert not stepped or torch.equal(seen[0], torch.full((2,), 1.5))
        assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0]) - 2 * 0.5 * 1.5)
        assert amp.state_dict() == {"loss_scaler0": {"loss_scale": 2.0**15, "unskipped": 1}}

    def test_the_level_is_apexs(self, amp):
        _, optimizer = make()
        Apex("O0").prepare(nn.Linear(1, 1), optimizer)
        assert amp.state_dict()["loss_scaler0"]["loss_scale"] == 1.0

    def test_the_scalers_state_is_apexs(self, amp):
        parameter, optimizer = make()
        precision = Apex()
        precision.prepare(nn.Linear(1, 1), optimizer)
        precision.backward(parameter.sum() * math.inf, optimizer)
        saved = precision.state_dict()
        assert saved == {"loss_scaler0": {"loss_scale": 2.0**15, "unskipped": 0}}
        amp.initialize(nn.Linear(1, 1), optimizer)
        precision.load_state_dict({})
        assert amp.state_dict()["loss_scaler0"]["loss_scale"] == 2.0**16
        precision.load_state_dict(saved)
        assert amp.state_dict() == saved


class TestTheDouble:
    def scale(self, amp) -> float:
        return amp.state_dict()["loss_scaler0"]["loss_scale"]

    def test_1_scale_loss_before_initialize_raises(self, amp):
        parameter, optimizer = make()
        with pytest.raises(RuntimeError, match="before"), amp.scale_loss(parameter.sum(), optimizer):
            pass

    def test_2_gradients_are_stashed_and_the_loss_is_scaled_in_float32(self, amp):
        parameter, optimizer = make()
        amp.initialize(None, optimizer, loss_scale=128)
        parameter.grad = torch.ones(2)
        with amp.scale_loss(parameter.sum().half(), optimizer) as scaled:
            assert parameter.grad is None
            assert (scaled.dtype, scaled.item()) == (torch.float32, 128 * 3.0)

    def test_3_gradients_are_unscaled_and_the_stash_added(self, amp):
        parameter, optimizer = make()
        amp.initialize(None, optimizer, loss_scale=128)
        parameter.grad = torch.ones(2)
        with amp.scale_loss(parameter.sum(), optimizer) as scaled:
            scaled.backward()
            assert torch.equal(parameter.grad, torch.full((2,), 128.0))
        assert torch.equal(parameter.grad, torch.full((2,), 2.0))
        with pytest.raises(KeyError), amp.scale_loss(parameter.sum(), optimizer) as scaled:
            scaled.backward()
            raise KeyError
        assert torch.equal(parameter.grad, torch.full((2,), 128.0))

    def test_4_an_overflow_halves_the_scale_and_skips_one_step(self, amp):
        parameter, optimizer = make()
        amp.initialize(None, optimizer)
        for factor in (1.0, math.inf):
            with amp.scale_loss(parameter.sum() * factor, optimizer) as scaled:
                scaled.backward()
        assert amp.state_dict()["loss_scaler0"] == {"loss_scale": 2.0**15, "unskipped": 0}
        parameter.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0]))
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.tensor([0.5, 1.5]))

    def test_5_the_scale_doubles_after_2000_backwards_up_to_its_maximum(self, amp):
        parameter, optimizer = make()
        amp.initialize(None, optimizer, max_loss_scale=2.0**17)
        for already, scale, unskipped in [(1998, 16, 1999), (1999, 17, 0), (1999, 17, 0)]:
            amp.load_state_dict({"loss_scaler0": {"loss_scale": self.scale(amp), "unskipped": already}})
            with amp.scale_loss(parameter.sum(), optimizer) as scaled:
                scaled.backward()
            assert amp.state_dict()["loss_scaler0"] == {"loss_scale": 2.0**scale, "unskipped": unskipped}

    def test_6_a_static_scale_of_one_leaves_the_loss_alone(self, amp):
        parameter, optimizer = make()
        amp.initialize(None, optimizer, opt_level="O0")
        loss = parameter.sum()
        with amp.scale_loss(loss, optimizer) as scaled:
            assert scaled is loss

    def test_7_the_steps_order_of_calls(self, amp, monkeypatch):
        calls = []

        def noted(name, function):
            return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

        parameter, optimizer = make()
        precision = Apex()
        precision.prepare(nn.Linear(1, 1), optimizer)
        enter = amp.scale_loss(parameter.sum(), optimizer)
        leave = enter.__exit__
        monkeypatch.setattr(type(enter), "__enter__", noted("enter", type(enter).__enter__))
        monkeypatch.setattr(type(enter), "__exit__", noted("exit", type(enter).__exit__))
        monkeypatch.setattr(torch.autograd, "backward", noted("backward", torch.autograd.backward))
        monkeypatch.setattr(amp, "master_params", noted("master_params", amp.master_params))
        optimizer.register_step_pre_hook(noted("step", lambda *_: None))
        optimizer.zero_grad()
        calls.append("zero_grad")
        precision.backward(parameter.sum(), optimizer)
        precision.update(optimizer, lambda: calls.append("clip") if precision.master_params(optimizer) else None)
        assert callable(leave)
        assert calls == ["zero_grad", "enter", "backward", "exit", "master_params", "clip", "step"]

    def test_8_delayed_gradients_stay_scaled_and_are_not_stashed(self, amp):
        """This comes from reading `apex/amp/handle.py`; it was not checked against the real apex."""
        parameter, optimizer = make()
        amp.initialize(None, optimizer, loss_scale=128)
        for backwards in (1, 2):
            with amp.scale_loss(parameter.sum(), optimizer, delay_unscale=True) as scaled:
                scaled.backward()
            assert torch.equal(parameter.grad, torch.full((2,), 128.0 * backwards))
        with amp.scale_loss(parameter.sum(), optimizer) as scaled:
            scaled.backward()
        assert torch.equal(parameter.grad, torch.full((2,), 3.0))
