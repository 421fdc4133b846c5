"""Class names of data sets whose files are not at hand when a cache is read, or that come without names."""

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()

CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile "
    "cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp "
    "lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree "
    "orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum "
    "rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider "
    "squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
).split()

# What the paper's own code calls the signs of the German Traffic Sign Recognition Benchmark, class id 0 to 42.
GTSRB = (
    "20_speed 30_speed 50_speed 60_speed 70_speed 80_speed 80_lifted 100_speed 120_speed "
    "no_overtaking_general no_overtaking_trucks right_of_way_crossing right_of_way_general give_way stop "
    "no_way_general no_way_trucks no_way_one_way attention_general attention_left_turn "
    "attention_right_turn attention_curvy attention_bumpers attention_slippery attention_bottleneck "
    "attention_construction attention_traffic_light attention_pedestrian attention_children "
    "attention_bikes attention_snowflake attention_deer lifted_general turn_right turn_left turn_straight "
    "turn_straight_right turn_straight_left turn_right_down turn_left_down turn_circle "
    "lifted_no_overtaking_general lifted_no_overtaking_trucks"
).split()


def clean_class_name(name):
    """Lower-case, with ``_`` and ``-`` turned into spaces: ``"Hard-leaved_Orchid"`` to ``"hard leaved
    orchid"``."""
    return name.lower().replace("_", " ").replace("-", " ")
