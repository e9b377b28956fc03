"""Lists of words from which questions are made; each entry's number is its level."""

__all__ = [
    "ALSO_FITS",
    "ALSO_RIGHT",
    "ANALOGIES",
    "ANTONYMS",
    "CATEGORIES",
    "PLURALS",
    "SPELLED",
    "VERBS",
    "WORDS",
    "pairs",
]


def pairs(text: str) -> list[tuple[str, ...]]:
    """Reads entries of words that a slash joins."""
    return [tuple(entry.split("/")) for entry in text.split()]


# Opposites, by level
ANTONYMS = {
    1: pairs(
        "hot/cold big/small up/down open/closed day/night happy/sad fast/slow old/young wet/dry full/empty left/right "
        "black/white good/bad long/short high/low hard/soft early/late rich/poor strong/weak in/out"
    ),
    2: pairs(
        "arrive/depart ancient/modern brave/cowardly begin/end deep/shallow far/near guilty/innocent heavy/light "
        "increase/decrease lose/find narrow/wide noisy/quiet push/pull remember/forget rough/smooth sharp/blunt "
        "sour/sweet thick/thin true/false war/peace"
    ),
    3: pairs(
        "artificial/natural borrow/lend cheap/expensive cruel/kind defeat/victory entrance/exit expand/shrink "
        "export/import fertile/barren generous/stingy humble/proud maximum/minimum optimist/pessimist permit/forbid "
        "polite/rude private/public reward/punishment rural/urban temporary/permanent vertical/horizontal"
    ),
    4: pairs(
        "abundant/scarce ally/enemy ascend/descend conceal/reveal diligent/lazy explicit/implicit fragile/sturdy "
        "hostile/friendly mandatory/optional novice/expert barbaric/civilized prosperity/poverty rigid/flexible "
        "superior/inferior tense/relaxed transparent/opaque ancestor/descendant vacant/occupied wither/bloom "
        "zenith/nadir"
    ),
    5: pairs(
        "acquit/convict benevolent/malevolent congenital/acquired credulous/skeptical dearth/surplus "
        "ephemeral/eternal eulogize/denounce frugal/wasteful garrulous/taciturn gregarious/solitary "
        "hinder/facilitate indigenous/foreign lethargic/energetic mitigate/aggravate nomadic/settled "
        "ostentatious/modest profane/sacred prudent/reckless synthesis/analysis turbid/clear"
    ),
}

# What belongs to what
CATEGORIES = {
    "fruit": "apple pear banana cherry grape plum peach lemon mango apricot",
    "vegetable": "carrot onion cabbage spinach potato leek radish broccoli turnip celery",
    "bird": "robin eagle sparrow owl pigeon swan heron magpie woodpecker albatross",
    "fish": "salmon trout herring tuna cod carp pike mackerel haddock sturgeon",
    "insect": "ant bee beetle butterfly moth wasp mosquito cricket grasshopper dragonfly",
    "tree": "oak birch pine maple willow beech ash spruce cedar poplar",
    "flower": "rose tulip daisy lily violet orchid daffodil sunflower carnation marigold",
    "tool": "hammer saw drill wrench pliers chisel screwdriver axe file spade",
    "musical instrument": "piano violin flute trumpet drum harp cello clarinet oboe trombone",
    "piece of furniture": "table chair sofa bed desk wardrobe bookcase stool bench cupboard",
    "piece of clothing": "shirt trousers coat skirt sock glove scarf sweater dress jacket",
    "metal": "iron copper gold silver tin lead zinc nickel aluminum platinum",
    "color": "red blue green yellow purple orange brown turquoise crimson beige",
    "vehicle": "car bus truck tram bicycle motorcycle train ship helicopter tractor",
    "part of the body": "arm leg knee elbow shoulder ankle chin wrist heel forehead",
    "sport": "tennis football rowing boxing hockey fencing archery basketball gymnastics judo",
    "profession": "doctor teacher lawyer carpenter baker plumber surgeon librarian architect blacksmith",
    "drink": "water milk tea coffee juice wine beer lemonade cocoa cider",
}

# Pairs that stand in one relation, by relation; the relation of the first pair is that of the second
ANALOGIES = {
    "young animal": pairs(
        "dog/puppy cat/kitten cow/calf sheep/lamb horse/foal hen/chick pig/piglet goat/kid duck/duckling "
        "goose/gosling bear/cub deer/fawn swan/cygnet frog/tadpole"
    ),
    "female": pairs(
        "king/queen man/woman boy/girl brother/sister father/mother uncle/aunt son/daughter husband/wife nephew/niece "
        "prince/princess actor/actress waiter/waitress duke/duchess wizard/witch"
    ),
    "home": pairs(
        "bird/nest bee/hive dog/kennel horse/stable spider/web fox/den rabbit/burrow beaver/lodge lion/lair"
    ),
    "group": pairs(
        "sheep/flock cattle/herd wolves/pack fish/school bees/swarm lions/pride soldiers/army players/team "
        "singers/choir"
    ),
    "tool of": pairs(
        "carpenter/hammer painter/brush writer/pen barber/scissors surgeon/scalpel gardener/spade cook/pan "
        "fisherman/net photographer/camera astronomer/telescope tailor/needle lumberjack/axe"
    ),
    "part of": pairs(
        "wheel/car petal/flower page/book finger/hand toe/foot roof/house branch/tree sail/ship string/violin "
        "key/piano blade/knife lens/camera pedal/bicycle"
    ),
    "made of": pairs(
        "bread/flour wine/grapes cheese/milk paper/wood glass/sand tire/rubber window/glass sweater/wool "
        "candle/wax brick/clay"
    ),
    "place of": pairs(
        "doctor/hospital teacher/school judge/court cook/kitchen farmer/field priest/church actor/stage pilot/cockpit "
        "miner/mine librarian/library baker/bakery scientist/laboratory"
    ),
    "sound": pairs(
        "dog/bark cat/meow cow/moo lion/roar duck/quack sheep/bleat wolf/howl bee/buzz snake/hiss pig/oink"
    ),
    "stronger": pairs(
        "warm/hot cool/cold big/huge small/tiny tired/exhausted angry/furious hungry/starving happy/delighted "
        "bad/terrible pretty/gorgeous scared/terrified dirty/filthy"
    ),
}

# What completes an analogy nearly as well as its own word does
ALSO_FITS = {
    word: others
    for word, *others in pairs(
        "lion/den fox/lair/burrow rabbit/den beaver/den sheep/herd cattle/flock tailor/scissors carpenter/axe "
        "wheel/bicycle string/piano pedal/car/piano roof/car baker/kitchen cook/bakery dog/howl wolf/bark"
    )
}

# Singular and plural, by level
PLURALS = {
    1: pairs("cat/cats dog/dogs book/books box/boxes bus/buses child/children man/men foot/feet baby/babies"),
    2: pairs(
        "city/cities toy/toys church/churches leaf/leaves woman/women mouse/mice tooth/teeth knife/knives "
        "tomato/tomatoes wish/wishes lady/ladies"
    ),
    3: pairs(
        "wolf/wolves shelf/shelves goose/geese potato/potatoes thief/thieves hero/heroes half/halves loaf/loaves "
        "calf/calves monkey/monkeys echo/echoes ox/oxen"
    ),
    4: pairs(
        "crisis/crises cactus/cacti radius/radii analysis/analyses criterion/criteria bacterium/bacteria "
        "phenomenon/phenomena hypothesis/hypotheses fungus/fungi thesis/theses"
    ),
    5: pairs(
        "stimulus/stimuli larva/larvae alumnus/alumni oasis/oases passer-by/passers-by son-in-law/sons-in-law "
        "attorney-general/attorneys-general parenthesis/parentheses nucleus/nuclei stratum/strata"
    ),
}

# Base, past, participle, by level
VERBS = {
    1: pairs("go/went/gone see/saw/seen eat/ate/eaten take/took/taken give/gave/given write/wrote/written"),
    2: pairs(
        "break/broke/broken speak/spoke/spoken drive/drove/driven fall/fell/fallen know/knew/known begin/began/begun "
        "sing/sang/sung swim/swam/swum"
    ),
    3: pairs(
        "freeze/froze/frozen steal/stole/stolen wear/wore/worn tear/tore/torn shake/shook/shaken hide/hid/hidden "
        "ring/rang/rung blow/blew/blown"
    ),
    4: pairs(
        "swear/swore/sworn weave/wove/woven sink/sank/sunk shrink/shrank/shrunk rise/rose/risen bite/bit/bitten "
        "forsake/forsook/forsaken throw/threw/thrown"
    ),
    5: pairs(
        "slay/slew/slain strive/strove/striven smite/smote/smitten tread/trod/trodden spring/sprang/sprung "
        "stink/stank/stunk undergo/underwent/undergone arise/arose/arisen"
    ),
}

# Forms that dictionaries give beside those above, for which they are no wrong answers
ALSO_RIGHT = {
    word: forms
    for word, *forms in pairs(
        "cactus/cactuses radius/radiuses phenomenon/phenomenons criterion/criterions fungus/funguses "
        "nucleus/nucleuses larva/larvas stratum/stratums echo/echos hero/heros leaf/leafs calf/calfs mouse/mouses "
        "wolf/wolf ox/ox foot/foot attorney-general/attorney-generals sing/sung ring/rung sink/sunk shrink/shrunk "
        "spring/sprung stink/stunk hide/hid bite/bit smite/smote tread/trod/treaded strive/strived weave/weaved/wove "
        "slay/slayed"
    )
}

# Words often misspelled, by level, each followed by three ways in which it is
SPELLED = {
    1: pairs(
        "because/becuase/becouse/beacause friend/freind/frend/freand people/poeple/peaple/pepole "
        "school/shcool/scool/schol believe/beleive/belive/beleave until/untill/untel/antil "
        "tomorrow/tommorow/tommorrow/tomorow beautiful/beutiful/beautifull/beautyful really/realy/reelly/raelly "
        "different/diferent/diffrent/differant"
    ),
    2: pairs(
        "separate/seperate/separete/seprate receive/recieve/receeve/receve definitely/definately/definitly/definetely "
        "surprise/suprise/supprise/surprice calendar/calander/calandar/calendor grammar/grammer/gramer/gramar "
        "government/goverment/governmant/govermment beginning/begining/beggining/biginning "
        "necessary/neccessary/necesary/neccesary library/libary/librery/liberry"
    ),
    3: pairs(
        "occurred/occured/ocurred/occurrd accommodate/accomodate/acommodate/acomodate "
        "embarrass/embarass/embarras/embaress rhythm/rythm/rhythem/rythem "
        "recommend/recomend/reccommend/reccomend independent/independant/indipendent/indepandent "
        "restaurant/restaraunt/restorant/resturant privilege/priviledge/privelege/privlege "
        "weird/wierd/weerd/werid existence/existance/existense/exsistence"
    ),
    4: pairs(
        "conscience/concience/consience/conscence maintenance/maintainance/maintenence/maintanance "
        "millennium/millenium/milennium/milenium perseverance/perserverance/perseverence/persaverance "
        "questionnaire/questionaire/questionnair/questionnare supersede/superceed/superseed/supersead "
        "occasionally/ocassionally/occasionaly/occassionally harass/harrass/harras/haras "
        "exaggerate/exagerate/exaggarate/exxagerate possession/posession/possesion/posesion"
    ),
    5: pairs(
        "liaison/liason/liasion/laiaison inoculate/innoculate/inocculate/innocculate "
        "minuscule/minescule/minnuscule/minuscle desiccate/dessicate/desicate/dessiccate "
        "sacrilegious/sacreligious/sacriligious/sacrelegious consensus/concensus/consencus/concencus "
        "mischievous/mischievious/mischevous/mischeivous hemorrhage/hemorrage/hemorhage/hemmorhage "
        "bureaucracy/beauracracy/bureacracy/buraucracy connoisseur/conoisseur/connoiseur/conniseur"
    ),
}

# Words for questions on letters, by level: the shorter, the easier
WORDS = {
    1: "cat dog sun map tree fish bird milk door hand book lamp ship rain snow".split(),
    2: "apple house water bread chair cloud grass horse light music paper river smile stone table".split(),
    3: "banana garden window yellow summer pepper kitten puzzle rabbit letter mirror pocket bottle button".split(),
    4: (
        "strawberry elephant butterfly classroom chocolate crocodile telephone newspaper committee successful "
        "parallel assessment balloon professor tennessee"
    ).split(),
    5: (
        "mississippi antidisestablishment bookkeeping correspondence incomprehensible characteristics acknowledgement "
        "representatives uncharacteristically disproportionately responsibilities unconstitutional misunderstanding "
        "electromagnetic entrepreneurship"
    ).split(),
}
