"""Word lists, mostly for English: which full stops do not end a sentence.

Changing a list changes cuts: raise `segment_rules.VERSION` in the same commit. Words have no final full stop
("e.g", "Mr").
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Always followed by the words they introduce, so they never end a sentence. Compared in lower case.
NEVER_LAST = _words("e.g i.e eg ie cf viz vs resp incl excl esp approx ca messrs mssrs")

# Titles before a name. Compared as written: "Gen." is a general, "gen." may be slang.
TITLES = _words(
    "Mr Mrs Ms Mx Dr Drs Prof Profs Gen Lt Col Capt Cmdr Maj Sgt Cpl Adm Rev Revd Fr Hon Gov Pres Sen Rep "
    "Mme Mlle MM Mons Sra Srta Supt Insp Amb Msgr mr mrs ms dr prof"
)

# The only list for other languages: titles before a name. Compared as written.
TITLES_ELSEWHERE = _words(
    "Prof Dra Sra Srta Sras Sres Mme Mmes Mlle Mlles MM Mgr Ing Lic Avv Dott Dipl Hr Fr Frl Frk проф акад "
    "доц тов стр ул"
)

# Before a number ("No. 5", "Fig. 3", "pp. 10-12", "Jan. 5"). Compared in lower case.
NUMBERED = _words(
    "no nos nr fig figs eq eqs eqn sec sect secs ch chap chaps vol vols p pp pg art arts op ver ref refs "
    "tab para par paras l ll n nn c b d r cap bk pt pts cl col cols app ex exs lib tom thm lem prop def "
    "cor jan feb mar apr jun jul aug sep sept oct nov dec"
)

# Of those, the ones that, capitalised, are abbreviations also without a number ("Vol. I", "Sept. Monday").
NUMBERED_TITLES = _words(
    "Nos Fig Figs Eq Eqs Sec Sect Ch Chap Vol Vols Art Op Ver Ref Bk Thm Lem Jan Feb Apr Aug Sept Oct Nov Dec"
)

# End a sentence only when what follows looks like the start of one. Compared in lower case.
SOMETIMES_LAST = _words(
    "etc al inc ltd co corp bros cos jr sr esq st ave blvd rd hwy mt mts ft dept univ assn assoc est govt "
    "intl natl mfg ed eds edn trans repr ibid op.cit loc.cit anon jnr snr dist cont'd"
)

# Shortened words that look like whole ones before a lower-case word ("orig. written", "pl. of ox").
LOWER_CASE = _words(
    "abbr adj adv avg dial dict elem equiv etym fam fem freq gen hist indef inf init intrans intro irreg "
    "lang lat lit masc math max med mil min misc mod neg neut nom obj obs occ opp opt orig param part pass "
    "perf pers phys plur pop poss prec pref prep pres prob pron prov pseud quot rad rec reg rel sci seq sing "
    "spec subj suppl syn tel temp trad usu var verb"
)

# Words that start sentences and do not follow an abbreviation as part of a name.
STARTERS = _words(
    "The A An This That These Those There Then Thus Therefore Here He She It They We You I His Her Its "
    "Their Our Your My Mine In On At By For From With Without Within When Whenever While Where Wherever "
    # words: quoted
    "Why What Whatever Who Whoever Whose Which How If Though Although Because Since After Before But And "
    "Or Nor So Yet As To No Not Never Nevertheless None Now Once One Some Many Most Much All Each Every "
    "Both Either Neither Another Such Only Even Still Perhaps Maybe However Meanwhile Moreover "
    "Furthermore Later Finally Also Let Do Did Does Don't Don’t Didn't Didn’t Is Are Was Were Has Have "
    "Had Can Could Would Should Under Over During Until Upon Between Among Despite Instead Just Nothing "
    # words: quoted
    "Nobody Everyone Everybody Everything Someone Something Anyone Anything Yes Oh Ah Well Please See "
    "It's It’s I'm I’m I'll I’ll I've I’ve I'd I’d He's He’s She's She’s That's That’s There's There’s "
    "They're They’re We're We’re We'll We’ll You're You’re Today Yesterday Tomorrow"
)

# A sentence continues after a quotation that ends in "!" or "?" when the speaker and one of these follow:
# “Who?” Jim asked.
SPEECH_VERBS = _words(
    "said says say asked asks answered answers cried cries replied replies exclaimed shouted whispered "
    "muttered murmured inquired enquired returned demanded called repeated added continued remarked "
    "began observed thought screamed growled gasped sighed laughed retorted interrupted ejaculated responded "
    "echoed"
)
