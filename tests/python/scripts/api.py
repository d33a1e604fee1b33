"""connect, attach, MoEExperts, stats, expert_gradients, without KT_COPROC in the environment."""

import argparse

import kt_coproc
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--address", required=True)
args = parser.parse_args()
transformers.logging.set_verbosity_error()

plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, experts_implementation="eager")
torch.manual_seed(0)
hidden = torch.randn(5, 64, requires_grad=True)
weights = torch.rand(5, 2, requires_grad=True)
index = torch.tensor([[0, 1], [2, 3], [7, 7], [4, 8], [8, 8]])  # 8: contributes zero.
upstream = torch.randn(5, 64)
expected = plain.model.layers[1].mlp.experts(hidden, index, weights)
expected_gradients = torch.autograd.grad(expected, (hidden, weights), upstream)


with kt_coproc.connect(args.address) as client:
    assert client.model["num_experts"] == 8
    experts = kt_coproc.MoEExperts(1, client)
    assert experts.gate_up_proj.shape == plain.model.layers[1].mlp.experts.gate_up_proj.shape
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = hidden.detach().to(dtype).requires_grad_()
        w = weights.detach().to(dtype).requires_grad_()
        output = experts(x, index, w)
        assert output.dtype == dtype and output.shape == (5, 64)
        torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
        output.backward(upstream.to(dtype))
        torch.testing.assert_close(x.grad.float(), expected_gradients[0], rtol=tolerance, atol=3 * tolerance)
        torch.testing.assert_close(w.grad.float(), expected_gradients[1], rtol=tolerance, atol=3 * tolerance)

    def run_experts(x, experts=experts):
        return experts(x.sin(), index, weights)

    # Without early stop the recomputation comes to the experts after their backward has used up the activation.
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        x = hidden.detach().requires_grad_()
        run = torch.utils.checkpoint.checkpoint(run_experts, x, use_reentrant=False)
        run.backward(upstream)
    plainly = hidden.detach().requires_grad_()
    run_experts(plainly).backward(upstream)
    assert torch.equal(x.grad, plainly.grad)
    nothing = experts(torch.empty(0, 64, requires_grad=True), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert nothing.shape == (0, 64)
    nothing.sum().backward()
    # Ids of any integer type and size, fewer columns than top_k, rows that are not contiguous.
    beyond = experts(hidden, torch.where(index == 8, 2**40, index), weights)
    torch.testing.assert_close(beyond, expected, rtol=1e-5, atol=1e-5)
    one = experts(hidden.detach().t().contiguous().t(), index[:, :1].int(), weights[:, :1])
    same = experts(hidden, torch.stack((index[:, 0], torch.full((5,), 8)), 1), weights)
    assert torch.equal(one, same)
    for wrong in (-1, -(2**40)):
        try:
            experts(hidden, torch.full((5, 2), wrong), weights)
            raise AssertionError("a negative id went through")
        except kt_coproc.CoprocError as error:
            assert "ids[0, 0] is -" in str(error)
    assert len(client.stats()["ranks"]) == 1
    with kt_coproc.connect(args.address) as again:
        assert len(again.stats()["ranks"]) == 1, "one session per process and address"
try:
    client.stats()
    raise AssertionError("a closed client works")
except kt_coproc.CoprocError as error:
    assert "closed" in str(error)
del experts, run_experts, output, nothing, run, beyond, one, same

client = kt_coproc.connect(args.address)
assert len(kt_coproc.stats(client)["ranks"]) == 1
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts", "KT_COPROC is not set"
assert kt_coproc.attach(model, client) is model and kt_coproc.attach(model, client) is model
ids = torch.arange(12)[None]
with torch.no_grad():
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
lora = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
model = get_peft_model(model, lora)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model(input_ids=ids, labels=ids).loss.backward()
gradients = kt_coproc.expert_gradients(model)
assert set(gradients) == {n for n, p in model.named_parameters() if "lora" in n} and len(gradients) == 12
assert all(g.dtype == torch.float32 and g.shape == model.get_parameter(n).shape for n, g in gradients.items())
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients.values()]).norm())
optimizer.step()
assert all(not g.any() for g in kt_coproc.expert_gradients(model).values())

other = AutoModelForCausalLM.from_config(plain.config)
try:
    kt_coproc.attach(other, client)
    raise AssertionError("a model that is not the daemon's was attached")
except kt_coproc.CoprocModelMismatch:
    pass
print("all good")
