"""What the five reports claim, for the table of claims in README.md. tables.py adds the differences
and their intervals; `here` is the conclusion that we draw from them."""
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
    here: str = field(kw_only=True)


CLAIMS = [
    Claim(1, "training on all three tasks is far better than on sentiment alone", "1a", "1b",
          ("sst",),
          here="not for sentiment: no significant difference, with a third of the examples"),
    Claim(1, "MLM pretraining adds about a point overall", "1b", "1c", (*SCORES, "overall_2023"),
          here="the opposite: it lowers both pair tasks and the overall score"),
    Claim(1, "gradient surgery adds half a point overall", "1b", "1d", (*SCORES, "overall_2023"),
          here="not seen; as small a gain as the report's is not excluded"),
    Claim(1, "MLM pretraining and surgery together are worse than MLM pretraining alone",
          "1c", "1e", ("overall_2023",),
          here="not seen; a loss as in the report is not excluded"),
    Claim(1, "MLM pretraining and surgery together are worse than surgery alone", "1d", "1e",
          ("overall_2023",),
          here="yes; and so is MLM pretraining without surgery worse than 1b"),
    Claim(1, "a lower rate, a larger batch and more dropout give no gain", "1b", "1f",
          (*SCORES, "overall_2023"),
          here="yes: at this budget all three tasks lose"),
    Claim(2, "sequential multitask training improves on sentiment alone", "2b", "2c", ("sst",),
          here="no: it is far below sentiment alone, with a twentieth of the examples; the "
               "report's gain is over .262, the share of the most frequent class"),
    Claim(2, "sequential training beats MT-DNN's schedule on the pair tasks", "2d", "2c",
          here="not for similarity, which is far worse, with a ninth of the examples; paraphrase "
               "is a little better, with 2.7 times as many"),
    Claim(2, "and by far in F1 of paraphrase", "2d", "2c", ("F1 of para",),
          theirs={"F1 of para": .186},
          here="higher, by a seventh of the report's difference, with 2.7 times the examples"),
    Claim(2, "MT-DNN's schedule over-fits less on paraphrase than sequential training", "2c", "2d",
          ("para gap",), theirs={"para gap": .042},
          here="not seen; in the report's own table it over-fits more"),
    Claim(2, "MLM pretraining improves sentiment and similarity, not paraphrase", "2c", "2e",
          here="no gain in any task, between two systems that are poor in two of them"),
    Claim(2, "MLM pretraining improves F1 of every sentiment class", "2c", "2e", CLASSES,
          theirs=dict(zip(CLASSES, (.030, .038, .012, .025, .024))),
          here="cannot be judged: both systems hardly learn sentiment, and never predict the two "
               "extreme classes"),
    Claim(2, "a cosine is a worse head for similarity than a linear layer", "2e", "2f",
          here="no: here it is better than a linear layer on [u; v], though far below the cosine "
               "of the untouched encoder (.838, in 3a)"),
    Claim(3, "fine-tuning improves sentiment over a frozen encoder", "3a", "3b", ("sst",),
          here="yes"),
    Claim(3, "training on the pair tasks too does not surpass sentiment alone", "3b", "3d",
          ("sst", "sts"),
          here="not contradicted: no significant difference in sentiment, with a third of the "
               "examples; similarity, which 3b does not train, gains much"),
    Claim(3, "SMART alone slightly lowers sentiment", "3b", "3c", ("sst",),
          here="not seen: here it gains, which one seed cannot tell from noise; only the proximal "
               "term acts"),
    Claim(3, "SMART and the pair tasks together do not surpass sentiment alone", "3b", "3e",
          ("sst", "sts"),
          here="not contradicted: no significant difference in sentiment, with a third of the "
               "examples"),
    Claim(3, "SMART with round robin is best for paraphrase and similarity", "3d", "3e",
          here="not seen: no significant difference in any task; only the proximal term acts"),
    Claim(3, "SMART reduces over-fitting", "3d", "3e", GAPS,
          here="not seen: no gap changes significantly"),
    Claim(4, "cross-encoding is far better on pairs", "4a", "4b",
          here="not with a frozen encoder of this kind: for similarity its cosine, without any "
               "training, is far better than a linear layer on the pair as one sequence"),
    Claim(4, "annealed sampling improves all tasks, paraphrase most", "4c", "4d",
          here="paraphrase a little, with twice the examples; sentiment, with half of them, is "
               "lower; similarity, with fewer than half, is lower in every seed, just short of "
               "significance; 4d also makes three times as many updates"),
    Claim(4, "trained heads are a better start than random ones", "4d", "4e",
          here="not seen; gains as in the report are not excluded"),
    Claim(4, "projected attention layers help a bit", "4e", "4e-pal",
          here="not seen; one seed cannot show a gain as small as the report's"),
    Claim(4, "SMART on top of all else is best", "4e-pal", "4f",
          here="cannot be judged: the term is all but zero at the report's radius"),
    Claim(4, "the best model far exceeds the frozen one", "4b", "4f",
          here="yes; so does 4e-pal, the same without SMART"),
    Claim(5, "fine-tuning gives a large gain over a frozen encoder", "5a", "5b",
          here="yes for the pairs, paraphrase with 2.7 times the examples and similarity with a "
               "ninth; not for sentiment, which has a sixth"),
    Claim(5, "mixed batches beat sequential training", "5b", "5c", (*SCORES, "overall_2023"),
          here="yes for sentiment, similarity and overall, not for paraphrase; but optimizers, "
               "examples per task and the size of an update differ too, and the rate was chosen "
               "for 5c"),
    Claim(5, "gradient surgery gives no noticeable gain", "5c", "5d", (*SCORES, "overall_2023"),
          here="not contradicted: no significant difference"),
    Claim(5, "at a dropout of .5 surgery helps", "5c-.5", "5d-.5",
          here="for paraphrase, between two single runs; not seen in the others"),
    Claim(5, "more dropout lowers sentiment", "5c", "5c-.5",
          here="as much as in the report, which one seed cannot tell from noise"),
    Claim(5, "more dropout lowers sentiment less with surgery", "5d", "5d-.5",
          here="not seen: as much as without surgery, and neither is significant"),
    Claim(5, "Yelp reviews as an auxiliary task impair the others", "5c", "5e",
          here="no: no significant difference, and for sentiment the report's is excluded"),
    Claim(5, "Yelp reviews impair the others at a dropout of .5 too", "5c-.5", "5e-.5",
          here="no: sentiment gains, between two single runs"),
    Claim(5, "Yelp reviews impair the others with surgery between the four tasks too", "5d", "5g",
          here="not seen; the report has no figures"),
    Claim(5, "surgery between the four tasks adds nothing to Yelp reviews", "5e", "5g",
          here="not contradicted for sentiment and similarity; paraphrase gains .008, where .007 "
               "is significant"),
    Claim(5, "surgery between Yelp's gradient and the sum of the other three adds nothing", "5e",
          "5g-sum",
          here="not contradicted: no significant difference"),
]
