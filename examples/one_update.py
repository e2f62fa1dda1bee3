"""One SPG update without Hydra: rollout, reward, advantage, masks, bounds, loss, step (Algorithm 1).

Run `python examples/one_update.py`. It takes a few seconds on a CPU and needs no download.
"""

from importlib.resources import files

import torch

from spg.algorithms.advantages import GroupMean
from spg.algorithms.estimators import ELBO, Mixture, Sandwich
from spg.algorithms.masking import BlockRandom
from spg.algorithms.objectives import SPG
from spg.core.types import Experience, UpdateBatch
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.policy import Policy
from spg.models.tokenizer import tiny_tokenizer
from spg.models.weights import load_weights
from spg.rollout.decoder import Decoder
from spg.tasks.sudoku import Sudoku

PROMPTS, COMPLETIONS, LENGTH, BLOCK = 8, 8, 24, 12
torch.manual_seed(0)

# the policy: the embedded LLaDA with the base weights for Sudoku that ship with the package
sizes = LLaDAConfig(64, 3, 8, 8, 192, vocab_size=29, embedding_size=32, rope_theta=100.0)
policy = Policy(LLaDA(sizes), tiny_tokenizer())
load_weights(policy.network, files("spg.assets").joinpath("base-sudoku-template-cd188e3224ca.safetensors"))
optimizer = torch.optim.AdamW(policy.parameters(), lr=1.5e-4)

# the rollout: B = 64 completions, 8 of each of 8 puzzles
task = Sudoku()
examples = [example for example in task.examples("train")[:PROMPTS] for _ in range(COMPLETIONS)]
group, index = torch.arange(PROMPTS).repeat_interleave(COMPLETIONS), torch.arange(len(examples))
prompts = policy.prepare(
    examples, [task.prompt(e) for e in examples], [task.template(e) for e in examples], group, index, LENGTH
)
decoder = Decoder(LENGTH, BLOCK, steps=8, temperature=0.9)
rollout = decoder(policy, prompts, seed=0)

# rewards [B] and advantages [B]: how much better than the other completions of the puzzle
rewards = torch.tensor(
    [sum(task.reward(e, text).values()) for e, text in zip(examples, rollout.texts, strict=True)]
)
advantages = GroupMean()(rewards.view(PROMPTS, COMPLETIONS)).flatten()
experience = Experience(rollout, rewards, {}, advantages)

# two masked copies of each completion, and the log-probabilities [B M T] of what is masked in them
samples = BlockRandom(block_size=BLOCK, num_mc=2)(rollout, policy.mask_id, seed=0)
batch = UpdateBatch.of(experience, samples)
rows, draws = samples.scored.any(-1).nonzero(as_tuple=True)
logps = torch.zeros(samples.scored.shape)
logps[rows, draws] = policy.token_logps(
    samples.tokens[rows, draws],
    rollout.attention_mask[rows],
    rollout.completion_ids[rows],
    samples.scored[rows, draws],
)

# the loss: a lower bound of the likelihood if the advantage is positive, a mixture with an upper bound if not
objective = SPG(Sandwich(positive=ELBO(), negative=Mixture(beta=1.5, omega=0.5)))
result = objective(logps, batch)
result.loss.backward()
norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.2)
optimizer.step()

print(f"reward         {rewards.mean():.4f}")
print(f"loss           {result.loss.item():.4f}")
print(f"gradient norm  {norm:.4f}")
for name, figure in result.figures.items():
    print(f"{name:14} {figure.mean():.4f}")
