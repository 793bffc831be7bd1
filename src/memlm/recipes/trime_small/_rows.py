"""Names of the rows of the table; "short" and "long" are the last tokens of the document, as many as the sizes say."""

NOTHING = "no memory"
CACHE_SHORT = "cache, short"
CACHE_SHORT_AGE = "cache, short, by age"
CACHE_LONG = "cache, long"
CACHE_LONG_AGE = "cache, long, by age"
SHORT_PLAIN = "one softmax, short, T = 1"
SHORT = "one softmax, short"
SHORT_AGE = "one softmax, short, by age"
LONG_PLAIN = "one softmax, long, T = 1"
LONG = "one softmax, long"
LONG_AGE = "one softmax, long, by age"
LONG_SHUFFLED = "one softmax, long, by age, tokens shuffled"
LONG_SHUFFLED_TUNED = "one softmax, long, by age, tokens shuffled, tuned so"
KNN = "kNN-LM"
KNN_CACHE = "kNN-LM and cache, long, under a gate"
DATASTORE_PLAIN = "one softmax, datastore, T = 1"
DATASTORE = "one softmax, datastore"
DATASTORE_TWICE = "one softmax, datastore, with second interpolation"
DATASTORE_LONG = "one softmax, datastore and long, by age"
DATASTORE_SHUFFLED = "one softmax, datastore, tokens shuffled"

# The pairs of rows that differ in nothing but the length of the memory, short first
LENGTHS = ("short", "long")
ROWS = (
    NOTHING,
    CACHE_SHORT,
    CACHE_SHORT_AGE,
    CACHE_LONG,
    CACHE_LONG_AGE,
    SHORT_PLAIN,
    SHORT,
    SHORT_AGE,
    LONG_PLAIN,
    LONG,
    LONG_AGE,
    LONG_SHUFFLED,
    LONG_SHUFFLED_TUNED,
    KNN,
    KNN_CACHE,
    DATASTORE_PLAIN,
    DATASTORE,
    DATASTORE_TWICE,
    DATASTORE_LONG,
    DATASTORE_SHUFFLED,
)
