"""What the five reports claim, for the table of claims in README.md. tables.py adds the differences
and whether ours are significant; `here` is the conclusion that we draw from them."""
from dataclasses import dataclass, field

SCORES = ("sst", "para", "sts")
GAPS = ("sst gap", "para gap", "sts gap")  # train minus dev
CLASSES = tuple(f"F1 of sst {label}" for label in range(5))


@dataclass
class Claim:
    report: int
    says: str
    base: str  # the two systems that show it: from, to
    system: str
    what: tuple = SCORES  # the quantities that are compared (values_of in tables.py)
    theirs: dict = field(default_factory=dict)  # {quantity: the report's difference} beside scores
    here: str = ""


CLAIMS = [
    Claim(1, "training on all three tasks is far better than on sentiment alone", "1a", "1b",
          ("sst",),
          here="not for sentiment: no significant difference, with a third of the examples"),
    Claim(1, "MLM pretraining adds about a point overall", "1b", "1c", (*SCORES, "overall_2023"),
          here="no: it lowers the score"),
    Claim(1, "gradient surgery adds half a point overall", "1b", "1d", (*SCORES, "overall_2023"),
          here="no significant difference in any task"),
    Claim(1, "MLM pretraining and surgery together are worse than MLM pretraining", "1c", "1e",
          ("overall_2023",),
          here="no: surgery changes nothing here either"),
    Claim(1, "and worse than surgery", "1d", "1e", ("overall_2023",),
          here="yes, as MLM pretraining alone is"),
    Claim(1, "lower rate, larger batch, more dropout: no gain", "1b", "1f",
          (*SCORES, "overall_2023"),
          here="yes: at this budget it loses in the pair tasks"),
    Claim(2, "multitask training in turn improves on sentiment alone", "2b", "2c", ("sst",),
          here="no: it is far below sentiment alone, with a twentieth of the examples; the "
               "report's gain is over .262, the share of the most frequent class"),
    Claim(2, "in turn beats MT-DNN's schedule on the pair tasks", "2c", "2d",
          here="for paraphrase a little, but the other two tasks lose more than it gains"),
    Claim(2, "and by far in F1 of paraphrase", "2c", "2d", ("F1 of para",),
          theirs={"F1 of para": -.186},
          here="yes in kind, a seventh of it in size"),
    Claim(2, "MT-DNN's schedule over-fits less on paraphrase", "2c", "2d", ("para gap",),
          theirs={"para gap": .042},
          here="no significant difference; in the report's own table it over-fits more"),
    Claim(2, "MLM pretraining improves sentiment and similarity, not paraphrase", "2c", "2e",
          here="no significant difference, between two systems that are poor in two of the "
               "tasks"),
    Claim(2, "MLM pretraining improves F1 of every sentiment class", "2c", "2e", CLASSES,
          theirs=dict(zip(CLASSES, (.030, .038, .012, .025, .024))),
          here="no: no class improves, and most are hardly ever predicted by either"),
    Claim(2, "a cosine is a worse head for similarity than a linear layer", "2e", "2f",
          here="no, here it is better than one on [u; v], though far below the cosine of the "
               "untouched encoder (.838, in 3a)"),
    Claim(3, "fine-tuning improves sentiment over a frozen encoder", "3a", "3b", ("sst",),
          here="yes"),
    Claim(3, "no extension surpasses training on sentiment alone: not the pair tasks", "3b", "3d",
          ("sst", "sts"),
          here="yes: no significant difference, with a third of the examples"),
    Claim(3, "SMART alone slightly lowers sentiment", "3b", "3c", ("sst",)),
    Claim(3, "nor SMART and the pair tasks together", "3b", "3e", ("sst", "sts")),
    Claim(3, "SMART with round robin is best for paraphrase and similarity", "3d", "3e"),
    Claim(3, "SMART reduces over-fitting", "3d", "3e", GAPS),
    Claim(4, "cross-encoding is far better on pairs", "4a", "4b",
          here="not with a frozen encoder of this kind: its cosine, without any training, is "
               "far better than a linear layer on the pair as one sequence"),
    Claim(4, "annealed sampling improves all tasks, paraphrase most", "4c", "4d",
          here="paraphrase a little, with twice the examples; sentiment, with half of them, is "
               "lower"),
    Claim(4, "trained heads are a better start than random ones", "4d", "4e",
          here="no significant difference"),
    Claim(4, "projected attention layers help a bit", "4e", "4e-pal",
          here="no significant difference; a bit is less than one seed can show"),
    Claim(4, "SMART on top of all else is best", "4e-pal", "4f"),
    Claim(4, "the best model far exceeds the frozen one", "4b", "4f"),
    Claim(5, "fine-tuning gives a large gain over a frozen encoder", "5a", "5b",
          here="yes for the pairs; not for sentiment, which has a sixth of the examples"),
    Claim(5, "mixed batches beat training in turn", "5b", "5c", (*SCORES, "overall_2023"),
          here="yes, most for sentiment; the optimizers differ as well"),
    Claim(5, "gradient surgery gives no noticeable gain", "5c", "5d", (*SCORES, "overall_2023"),
          here="yes: no significant difference"),
    Claim(5, "at a dropout of .5 surgery helps", "5c-.5", "5d-.5",
          here="for paraphrase, between two single runs; in none of the others"),
    Claim(5, "more dropout lowers sentiment", "5c", "5c-.5",
          here="no significant difference"),
    Claim(5, "less so with surgery", "5d", "5d-.5",
          here="the same with surgery"),
    Claim(5, "an auxiliary task of Yelp reviews impairs the others", "5c", "5e",
          here="no: no significant difference"),
    Claim(5, "so it does at a dropout of .5", "5c-.5", "5e-.5",
          here="no: sentiment gains, between two single runs"),
    Claim(5, "and with surgery between the four", "5d", "5g",
          here="no: no significant difference"),
    Claim(5, "to which surgery adds nothing", "5e", "5g",
          here="yes: no significant difference"),
    Claim(5, "nor does surgery between the three's sum and Yelp", "5e", "5g-sum",
          here="yes: no significant difference"),
]
