"""How good a model is: perplexity on held-out text, accuracy on masked tokens, tasks of
lm-evaluation-harness, and what counting alone achieves.

score = evaluate_perplexity(model, tokenizer, load_corpus("held_out.txt"), context=1024)
"""

from cottention.evaluation.glue import GlueScores as GlueScores
from cottention.evaluation.glue import glue_scores as glue_scores
from cottention.evaluation.harness import HarnessResult as HarnessResult
from cottention.evaluation.harness import HarnessScore as HarnessScore
from cottention.evaluation.harness import evaluate_harness as evaluate_harness
from cottention.evaluation.masked_lm import MaskedLMResult as MaskedLMResult
from cottention.evaluation.masked_lm import evaluate_masked_lm as evaluate_masked_lm
from cottention.evaluation.ngram import BigramModel as BigramModel
from cottention.evaluation.ngram import TrigramModel as TrigramModel
from cottention.evaluation.ngram import UnigramModel as UnigramModel
from cottention.evaluation.perplexity import PerplexityResult as PerplexityResult
from cottention.evaluation.perplexity import PositionScore as PositionScore
from cottention.evaluation.perplexity import evaluate_perplexity as evaluate_perplexity
from cottention.evaluation.score import TextScore as TextScore
